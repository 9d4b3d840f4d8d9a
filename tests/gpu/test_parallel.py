"""Several GPUs answer as one does, through NCCL, with CUDA graphs and without."""

import os
import signal
import threading
from time import monotonic

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.bench.gpu import qwen3_folder
from tests.conftest import SIZES, save_random_model

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
PROMPTS = [[(7 * i + n) % 250 for i in range(n)] for n in (1, 3, 40, 90, 17, 64, 600)]  # 815 tokens: in pieces


@pytest.fixture(scope="module")
def eight_heads_path(tmp_path_factory):
    """As many as there are GPUs in most computers; two KV heads."""
    config = Qwen3Config(head_dim=32, **SIZES | {"num_attention_heads": 8})
    return save_random_model(Qwen3ForCausalLM, config, tmp_path_factory.mktemp("eight-heads"))


@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_several_gpus_answer_as_one(eight_heads_path, size, enforce_eager):
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    settings = dict(dtype="float32", device="cuda", num_kv_blocks=100, enforce_eager=enforce_eager)
    one, several = LLM(eight_heads_path, **settings), LLM(eight_heads_path, tensor_parallel_size=size, **settings)
    answers = [[a["token_ids"] for a in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] for llm in (one, several)]
    assert answers[0] == answers[1]
    assert [rank["device"] for rank in several.engine.model_runner.describe()] == [f"cuda:{i}" for i in range(size)]
    several.close()


def test_two_gpus_overlap_steps(tiny_qwen3_path):
    """Also with answers and questions that are longer than a pipe holds: many log-probabilities, many tokens."""
    settings = dict(dtype="float32", device="cuda", num_kv_blocks=2000, max_num_batched_tokens=8192, max_num_seqs=200)
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=5 + i % 7, ignore_eos=True, logprobs=20)
        for i in range(300)
    ]
    prompts = [[(i + n) % 250 for n in range(1 + i % 90)] for i in range(300)]
    llm = LLM(tiny_qwen3_path, tensor_parallel_size=2, **settings)
    answers = [[a["token_ids"] for a in llm.generate(prompts, params, use_tqdm=False)]]
    assert llm.engine.overlap is not None
    llm.engine.overlap = None
    llm.reset_prefix_cache()
    answers.append([a["token_ids"] for a in llm.generate(prompts, params, use_tqdm=False)])
    assert answers[0] == answers[1]
    llm.close()


@pytest.mark.parametrize("size", [2, 4])
def test_graphs_take_no_more_than_was_reserved_for_them(size):
    """What ranks exchange in a graph takes memory, too."""
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    with qwen3_folder() as path:
        llm = LLM(
            path, load_format="dummy", max_num_batched_tokens=16_384, max_model_len=4096, tensor_parallel_size=size
        )
    memory = llm.engine.model_runner.memory
    llm.close()
    reserved = memory.reserved - memory.step
    assert 0.5 * reserved < memory.graphs <= reserved, memory


def test_the_cache_is_as_large_as_the_smaller_one(tiny_qwen3_path):
    taken = torch.empty(8 << 30, dtype=torch.uint8, device="cuda:1")
    llm = LLM(tiny_qwen3_path, tensor_parallel_size=2, device="cuda", gpu_memory_utilization=0.5, enforce_eager=True)
    caches = [rank["kv_cache"] for rank in llm.engine.model_runner.describe()]
    assert caches[0] == caches[1] and llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    llm.close()
    del taken


def test_an_engine_on_the_second_gpu(tiny_qwen3_path):
    """Triton, graphs and events would take the first, which is torch's current one before, between and after."""
    settings = dict(dtype="float32", num_kv_blocks=100)
    params = [
        SamplingParams(temperature=i % 2, seed=i, top_p=1 - i % 3 / 10, logprobs=i, max_tokens=20, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    engines = [LLM(tiny_qwen3_path, device=device, **settings) for device in ("cuda:1", "cuda")]
    answers = [llm.generate(PROMPTS, params, use_tqdm=False) for llm in engines]
    for a, b in zip(*answers):
        assert a["token_ids"] == b["token_ids"]
        assert [list(best) for best in a["logprobs"]] == [list(best) for best in b["logprobs"]]
    assert [llm.engine.model_runner.kv_cache.device.index for llm in engines] == [1, 0]
    assert torch.cuda.current_device() == 0
    for llm in engines:
        llm.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_inside_a_step(tiny_qwen3_path, rank):
    """NCCL waits for it for ever: the parent must not. Afterwards the GPUs are free for a new engine."""
    settings = dict(tensor_parallel_size=2, device="cuda", num_kv_blocks=200)
    llm = LLM(tiny_qwen3_path, **settings)
    processes = llm.engine.model_runner.processes
    killed = []

    def kill() -> None:
        killed.append(monotonic())
        os.kill(processes[rank].pid, signal.SIGKILL)

    threading.Timer(0.5, kill).start()
    with pytest.raises(RuntimeError, match=f"rank {rank} of 2 was killed by SIGKILL"):
        llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True), use_tqdm=False)
    assert monotonic() - killed[0] < 5
    assert all(process.poll() is not None for process in processes)
    llm = LLM(tiny_qwen3_path, **settings)
    assert llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    llm.close()
