"""Fixtures: tiny random checkpoints, made by transformers, and the default model."""

import gc
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

# The workers of pytest-xdist share the cores: threads that wait for each other sleep soon, and do not spin for long. On
# two cores a decode step takes 85 ms beside two more engines, not 430 (measured). Read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nanovllm import LLM, SamplingParams
from nanovllm.utils.hub import resolve_model

SIZES = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    eos_token_id=[256, 257],  # more than one, as in many chat models
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# How far a result may be from the exact one, relative to its size: a few roundings.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

# The cores are shared with the other workers of pytest-xdist.
ALL_THREADS = max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))


def pytest_configure(config: pytest.Config) -> None:
    """Where there is a GPU, the tests do not see it: they run on a CPU, several at a time.

    Those marked `gpu` want it to themselves: `pytest -m gpu -n 0`.
    """
    # What a script starts in the background ignores Ctrl-C, and so do its children; some tests press it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU, for itself: pytest -m gpu -n 0")
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, and say why, what this computer cannot run, or would rightly give other numbers for."""
    is_linux_x86_64 = (sys.platform, platform.machine()) == ("linux", "x86_64")
    for item in items:
        if item.path.suffix == ".ipynb" and not is_linux_x86_64:
            item.add_marker(pytest.mark.skip(reason="its outputs were saved on Linux x86-64: others round differently"))
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if item.path.parent.name == "gpu" or parameters.get("device") == "cuda":
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest -m gpu -n 0"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A tiny model has nothing to share between threads: they would only wait for each other."""
    fixtures = getattr(item, "fixturenames", ())
    torch.set_num_threads(ALL_THREADS if "default_model_path" in fixtures else 1)


def failing_once(method: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """`method`, but the first call raises."""
    errors = [error]

    def call(*args: Any) -> Any:
        if errors:
            raise errors.pop()
        return method(*args)

    return call


class Panic(BaseException):
    """As `pyo3_runtime.PanicException`, which tokenizers raise where their Rust panics, it is no Exception."""


@contextmanager
def alarms(error: BaseException) -> Iterator[None]:
    """While it lasts, an alarm raises an error."""

    def handler(*_: Any) -> None:
        raise error

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        yield
        assert signal.getsignal(signal.SIGALRM) is handler, "nobody has taken its place for good"
    finally:
        signal.signal(signal.SIGALRM, previous)


def interrupted(method: Callable[..., Any], call_number: int = 1, signum: int = signal.SIGALRM) -> Callable[..., Any]:
    """`method`; at the end of one of its calls a signal comes, an alarm if nothing else is said."""
    numbers = count(1)

    def call(*args: Any) -> Any:
        result = method(*args)
        if next(numbers) == call_number:
            signal.raise_signal(signum)
        return result

    return call


def collecting_once(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`; before its first call Python's garbage collector runs, as it may anywhere."""
    calls = []

    def call(*args: Any) -> Any:
        if not calls:
            calls.append(gc.collect())
        return method(*args)

    return call


def abandoned_stream(llm: LLM, prompt: str | list[int], params: SamplingParams) -> None:
    """A stream that has begun, held by nobody but itself: Python's garbage collector ends it, wherever it runs next."""
    cycle: list[Any] = [llm.stream(prompt, params)]
    cycle.append(cycle)
    next(cycle[0])


@contextmanager
def collector_off() -> Iterator[None]:
    """In a `with` block Python looks for no cycles of garbage; those that there were have gone before."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
def seeded() -> Iterator[None]:
    """Random numbers that are the same in every run, and no gradients."""
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def tiny_qwen3_path(tmp_path_factory) -> Path:
    """Two layers of Qwen3: heads wider than hidden_size / num_heads, an untied head."""
    config = Qwen3Config(head_dim=32, tie_word_embeddings=False, **SIZES)
    return save_random_model(Qwen3ForCausalLM, config, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def tiny_llama_path(tmp_path_factory) -> Path:
    """Two layers of Llama: a head tied to the embedding."""
    config = LlamaConfig(tie_word_embeddings=True, **SIZES)
    return save_random_model(LlamaForCausalLM, config, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def model_path(tiny_qwen3_path) -> Path:
    return tiny_qwen3_path


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """SmolLM2-135M-Instruct, fetched if this is the first time."""
    return resolve_model(None)


def save_random_model(model_class: type[PreTrainedModel], config: PretrainedConfig, path: Path) -> Path:
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # so large that the best two logits are seldom close
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": config.eos_token_id}))
    return path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and three special ones: any text can be encoded, and nothing has to be trained."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture
def tapes() -> None:
    """Skips where what an operator gave cannot be kept in inference mode, so that nothing is recorded."""
    if torch.__version__.startswith("2.4."):
        pytest.skip("PyTorch 2.4 lets no dispatch mode keep the tensors that it sees in inference mode")
