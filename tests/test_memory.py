"""What an engine takes of a device's memory, what it says if that is too little, and that it gives all of it back.

tests/gpu/test_memory.py measures it on a GPU.
"""

import weakref

import pytest
import torch
from transformers import PretrainedConfig

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine import kv_cache
from nanovllm.engine.kv_cache import size_kv_cache
from nanovllm.engine.model_runner import ModelRunner, forget_locals, resolve_device, resolve_dtype
from nanovllm.kernels import torch_attention

from .conftest import collector_off

GB = 1 << 30
CUDA = torch.device("cuda")


@pytest.fixture
def gpu_with(monkeypatch):
    """A GPU of 16 GiB as far as the sizing of the KV cache knows, with so many bytes free."""

    def set_free(free: int) -> None:
        monkeypatch.setattr(kv_cache, "free_memory", lambda device: free)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 16 * GB))

    return set_free


def test_the_cache_takes_what_the_rest_leaves_of_the_allowed_share(gpu_with):
    gpu_with(15 * GB)
    config = Config(gpu_memory_utilization=0.9)
    assert size_kv_cache(config, 1 << 20, CUDA, reserved=2 * GB) == int(13 * GB - 0.1 * 16 * GB) // (1 << 20) - 1


@pytest.mark.parametrize(
    ("settings", "knobs"),
    [
        ({}, "raise kv_cache_memory, num_kv_blocks or gpu_memory_utilization, or lower max_model_len"),
        ({"num_kv_blocks": 10}, "lower num_kv_blocks or kv_cache_memory"),
        ({"kv_cache_memory": GB}, "lower num_kv_blocks or kv_cache_memory"),
    ],
)
def test_less_free_than_a_step_needs(gpu_with, settings, knobs):
    """What is said names a setting that would help, and no device has less than nothing."""
    gpu_with(1 * GB)
    with pytest.raises(ValueError, match=knobs) as error:
        size_kv_cache(Config(max_model_len=100, **settings), 1 << 20, CUDA, reserved=2 * GB)
    assert "cuda has 0.00 GB free beside 2.15 GB for a step" in str(error.value)


def test_no_memory_for_the_weights_says_what_to_turn(model_path, monkeypatch):
    def build(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(ModelRunner, "build", build)
    with pytest.raises(ValueError, match="too little memory for the weights.*lower max_num_batched_tokens.*1 GiB"):
        LLM(model_path, device="cpu")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:2', but the last GPU here is 'cuda:1'"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("capability, auto", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_bfloat16_is_for_gpus_that_have_it(capability, auto, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu, checkpoint = torch.device("cuda"), PretrainedConfig(torch_dtype="bfloat16")
    assert resolve_dtype("auto", checkpoint, gpu) == auto
    assert resolve_dtype("float32", checkpoint, gpu) == torch.float32
    assert resolve_dtype("bfloat16", checkpoint, torch.device("cpu")) == torch.bfloat16
    if capability >= (8, 0):
        assert resolve_dtype("bfloat16", checkpoint, gpu) == torch.bfloat16
    else:
        with pytest.raises(
            ValueError, match=r"dtype='bfloat16' needs a GPU of compute capability 8.0 .*; use 'float16'"
        ):
            resolve_dtype("bfloat16", checkpoint, gpu)


def test_a_closed_engine_holds_nothing_large(model_path):
    """Notebooks keep the engine, or its runner, to look at."""
    llm = LLM(model_path, dtype="float32", device="cpu", num_kv_blocks=40)
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
    engine, runner = llm.engine, llm.engine.model_runner
    large = [weakref.ref(runner.model), weakref.ref(runner.kv_cache)]
    with collector_off():
        llm.close()
        assert [ref() for ref in large] == [None, None]
    engine.close()  # twice is fine
    assert runner.num_blocks == 40, "what is small can still be looked at"


def test_an_error_on_the_way_to_another_holds_nothing():
    """The end of a CUDA graph may fail because its recording did: the second error knows the first."""
    held = []

    def step() -> None:
        model = torch.empty(1)
        held.append(weakref.ref(model))
        raise MemoryError

    def recording() -> None:
        try:
            step()
        finally:
            raise RuntimeError("the recording is broken")

    with collector_off(), pytest.raises(RuntimeError) as error:
        recording()
    assert held[0]() is not None
    forget_locals(error.value)
    assert held[0]() is None


def test_no_more_is_gathered_at_a_time_than_there_is_room_for(model_path, monkeypatch):
    """256 decodes of 4,096 tokens would be 4 GB of a model of 0.6 billion parameters."""
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [[i] * (20 + i % 3) for i in range(12)] + [[7] * 150, [8] * 3]
    llm = LLM(model_path, dtype="float32", device="cpu", num_kv_blocks=60)
    expected = [answer["token_ids"] for answer in llm.generate(prompts, greedy, use_tqdm=False)]

    assert torch_attention.group_by_length([30] * 5 + [200, 29, 5], max_slots=100) == [[5], [0, 1, 2], [3, 4, 6], [7]]
    runner = llm.engine.model_runner
    bytes_per_slot = 2 * runner.kv_cache[0, 0, 0, 0].nbytes
    monkeypatch.setattr(torch_attention, "MAX_BYTES", {"cpu": 100 * bytes_per_slot})
    gathered = []
    select = torch.index_select
    monkeypatch.setattr(torch, "index_select", lambda *args, out: gathered.append(out.nbytes) or select(*args, out=out))
    llm.reset_prefix_cache()
    assert [answer["token_ids"] for answer in llm.generate(prompts, greedy, use_tqdm=False)] == expected
    assert 150 * bytes_per_slot < 2 * max(gathered) < 160 * bytes_per_slot  # the longest, alone
