"""How much of a GPU the engine takes, and that it gives it back."""

import json
import subprocess
import sys

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.bench.gpu import QWEN3, qwen3_folder


def used() -> int:
    """Bytes, as other processes see it."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_what_is_taken_is_told_and_stays_within_bounds(tiny_qwen3_path, caplog):
    """The largest step there is, right after the KV cache took what was left of half of the memory."""
    total = torch.cuda.mem_get_info()[1]
    with caplog.at_level("INFO"):
        llm = LLM(
            tiny_qwen3_path, device="cuda", gpu_memory_utilization=0.5, max_num_batched_tokens=2048, max_num_seqs=64
        )
    memory = llm.engine.model_runner.memory
    assert min(memory.weights, memory.step, memory.graphs, memory.kv_cache) > 0
    assert all(
        part in caplog.text for part in ("CUDA graphs for", "captured in", "memory: weights", "reserved", "kv cache")
    )
    prompts = [[7] * 2000 for _ in range(64)]
    llm.generate(prompts, SamplingParams(temperature=0.7, top_p=0.9, max_tokens=4), use_tqdm=False)
    assert 0.4 * total < used() < 0.51 * total
    llm.close()


def test_no_step_takes_more_than_was_reserved_for_it():
    """What takes most is to sample: many rows, a large vocabulary, a nucleus for which all of it must be sorted."""
    sizes = QWEN3 | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    with qwen3_folder("tiny", sizes | dict(num_key_value_heads=2, head_dim=32)) as path:
        settings = dict(num_kv_blocks=300, max_model_len=64, max_num_batched_tokens=256, max_num_seqs=256)
        llm = LLM(path, load_format="dummy", device="cuda", **settings)
    params = SamplingParams(temperature=10.0, top_p=0.9, max_tokens=4, logprobs=20, ignore_eos=True)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    llm.generate([[i] for i in range(256)], params, use_tqdm=False)
    taken, reserved = torch.cuda.max_memory_reserved() - before, llm.engine.model_runner.memory.step
    assert 100e6 < taken < 1.05 * reserved
    llm.close()


def test_decodes_outside_of_graphs_take_no_more_than_was_reserved():
    """A piece of each context has an output of its own: with many heads and few layers these are the largest.

    What torch keeps besides, of memory that smaller steps had, it gives back before it asks for more than there is.
    """
    sizes = QWEN3 | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=2000)
    with qwen3_folder("tiny", sizes | dict(num_attention_heads=32, num_key_value_heads=8)) as path:
        settings = dict(num_kv_blocks=2000, max_num_batched_tokens=1100, max_num_seqs=1024, max_model_len=8192)
        llm = LLM(path, load_format="dummy", device="cuda", **settings)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    llm.generate([[7] * 8100] + [[i] for i in range(1023)], params, use_tqdm=False)
    taken, reserved = torch.cuda.max_memory_allocated() - before, llm.engine.model_runner.memory.step
    assert 268e6 < taken < reserved, (taken, reserved)
    llm.close()


NEW_ENGINE = """
import json, sys
from dataclasses import asdict
from nanovllm import LLM
llm = LLM(**json.loads(sys.argv[1]))
print(json.dumps(asdict(llm.engine.model_runner.memory)))
"""


@pytest.mark.parametrize("settings", [{}, dict(max_num_batched_tokens=16_384, max_model_len=4096)])
def test_graphs_take_no_more_than_was_reserved_for_them(settings):
    """In a process of its own: CUDA keeps what it has taken for graphs, and gives it to the process's next ones."""
    with qwen3_folder() as path:
        given = json.dumps({"model": str(path), "load_format": "dummy", "device": "cuda"} | settings)
        output = subprocess.check_output([sys.executable, "-c", NEW_ENGINE, given], text=True)
    memory = json.loads(output.splitlines()[-1])
    reserved = memory["reserved"] - memory["step"]
    assert 0.5 * reserved < memory["graphs"] <= reserved, memory


def test_too_little_memory_says_how_much_and_what_to_turn(tiny_qwen3_path):
    with pytest.raises(
        ValueError, match="GB free beside .* GB for a step and its CUDA graphs; .*gpu_memory_utilization"
    ):
        LLM(tiny_qwen3_path, device="cuda", gpu_memory_utilization=0.001)


def test_engines_that_could_not_be_made_leave_nothing_behind(tiny_qwen3_path):
    """Not even while somebody holds the errors, as a notebook does."""
    errors, after = [], []
    for _ in range(4):
        with pytest.raises(ValueError, match="a KV cache of .* blocks needs") as error:
            LLM(tiny_qwen3_path, device="cuda", num_kv_blocks=10**9)
        errors.append(error.value)
        torch.cuda.empty_cache()
        after.append(used())
    assert after[-1] <= after[0] + (1 << 20)


@pytest.mark.parametrize("num_kv_blocks", [100, None])  # None takes nine tenths of the GPU
def test_ten_engines_one_after_the_other_leave_nothing_behind(tiny_qwen3_path, num_kv_blocks):
    settings = dict(dtype="float32", device="cuda", num_kv_blocks=num_kv_blocks, max_num_seqs=16)
    LLM(tiny_qwen3_path, **settings).close()
    before = used()
    for _ in range(10):
        llm = LLM(tiny_qwen3_path, **settings)
        llm.generate(["Hello"], SamplingParams(max_tokens=4), use_tqdm=False)
        llm.close()
    assert used() <= before + (8 << 20)
