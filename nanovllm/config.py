"""Config: every setting of the engine, validated once, when it is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.utils.checks import check_bool, check_choice, check_float, check_int, refuses_unknown_settings


@refuses_unknown_settings
@dataclass(slots=True)
class Config:
    """The engine's settings. Names follow vLLM where they mean the same.

    A wrong type is a TypeError, a wrong value a ValueError, an unknown name a TypeError that suggests the nearest one.
    What is None here is found out when the model is loaded, and then stands here too.

    What to run:
        model: a local folder, a Hugging Face repository id, or None for the default model, SmolLM2-135M-Instruct.
        load_format: "auto" reads the checkpoint; "dummy" makes random weights, for benchmarks.
        dtype: "auto" is float32 on a CPU; on a GPU the checkpoint's, float16 below compute capability 8.0.
        device: "auto" is "cuda" if there is a GPU, else "cpu".
        attention_backend: "torch", "triton" (GPUs), "flash_attn" (GPUs from 8.0 on, with the package and blocks of
            256), or "auto", which is triton on a GPU where it works, else torch.
        tensor_parallel_size: how many ranks share the model, each a process with a GPU, or on a CPU some of its cores.
        enforce_eager: no CUDA graphs, for stepping through. There are none on a CPU anyway.

    How much at once:
        max_model_len: longest sequence in tokens, prompt and answer together. None is the model's own limit, or what
            the KV cache can hold if that is less.
        max_num_seqs: sequences that run at the same time.
        max_num_batched_tokens: the token budget of a step, 65,535 at most. A longer prompt is computed in several
            steps.

    Where keys and values live:
        block_size: tokens in a block of the KV cache.
        enable_prefix_caching: share the blocks of prompts that begin alike.
        num_kv_blocks: size of the KV cache in blocks. None is as many as the memory below holds.
        kv_cache_memory: its size in bytes. None is 1 GiB on a CPU, and on a GPU what is left of
        gpu_memory_utilization: the fraction of a GPU's memory that may be in use, by the engine and all others there.

    scheduler: a class to use instead of `Scheduler`, called with `(config, block_manager)`.
    """

    model: str | Path | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    attention_backend: str = "auto"
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    enable_prefix_caching: bool = True
    num_kv_blocks: int | None = None
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    scheduler: Any = None

    def __post_init__(self) -> None:
        if self.model is not None and not isinstance(self.model, (str, Path)):
            raise TypeError(f"model must be a folder, a repository id or None, not {self.model!r}")
        check_choice("load_format", self.load_format, ["auto", "dummy"])
        check_choice("dtype", self.dtype, ["auto", "float32", "bfloat16", "float16"])
        check_choice("attention_backend", self.attention_backend, ["auto", "torch", "triton", "flash_attn"])
        if not isinstance(self.device, str):
            raise TypeError(f"device must be a string such as 'auto', 'cpu' or 'cuda', not {self.device!r}")
        check_bool("enforce_eager", self.enforce_eager)
        for name in ("tensor_parallel_size", "block_size"):
            setattr(self, name, check_int(name, getattr(self, name), at_least=1))
        # More could make more tiles of attention than a GPU's grid has places for on one axis.
        self.max_num_batched_tokens = check_int(
            "max_num_batched_tokens", self.max_num_batched_tokens, at_least=1, at_most=2**16 - 1
        )
        # Each has a row in tables that are made at the start: more would be a slip, and an error of the memory's.
        self.max_num_seqs = check_int("max_num_seqs", self.max_num_seqs, at_least=1, at_most=2**20)
        for name, least in (("max_model_len", 2), ("num_kv_blocks", 1), ("kv_cache_memory", 1)):
            if getattr(self, name) is not None:
                setattr(self, name, check_int(name, getattr(self, name), at_least=least))
        check_bool("enable_prefix_caching", self.enable_prefix_caching)
        self.gpu_memory_utilization = check_float(
            "gpu_memory_utilization", self.gpu_memory_utilization, at_most=1, open_below=True
        )
        if self.scheduler is not None and not callable(self.scheduler):
            raise TypeError(f"scheduler must be a class called with (config, block_manager), not {self.scheduler!r}")
