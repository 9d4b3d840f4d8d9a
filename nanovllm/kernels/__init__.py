"""Attention backends: one small interface, several ways to compute it.

A backend is a module with four functions; `torch_attention` is the reference, written to be read:

    allocate(num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype, device)   the KV cache
    plan(context, k_cache)                                  what can be worked out once a step, for all layers
    store(key, value, k_cache, v_cache, slot_mapping)       keep the step's new keys and values
    attend(query, k_cache, v_cache, context, scale, output) attention of the new tokens to all before them
"""

import logging
import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

BACKENDS = {
    "torch": "nanovllm.kernels.torch_attention",
    "triton": "nanovllm.kernels.triton_attention",
    "flash_attn": "nanovllm.kernels.flash_attention",
}


def get_backend(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    block_size: int | None = None,
    head_dim: int | None = None,
) -> ModuleType:
    """The attention backend called `name`. ValueError if there is none, or it cannot run with what is given.

    What is None is not known yet, and not looked at.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention_backend must be one of {', '.join(map(repr, BACKENDS))}, not {name!r}")
    if name == "flash_attn":
        refuse_flash_attention(torch.device(device), dtype, block_size, head_dim)
    try:
        if name == "triton":
            refuse_triton(torch.device(device))
        return import_module(BACKENDS[name])
    except ImportError as error:
        instead = FLASH_INSTEAD if name == "flash_attn" else "use 'torch'"
        raise ValueError(f"attention_backend={name!r} cannot be imported here: {error}; {instead}") from error


# Tritons, by version, that cannot compile a matrix product for GPUs below this compute capability.
TRITON_FROM = {(3, 2): (7, 5), (3, 3): (8, 0)}


def triton_version() -> tuple[int, int]:
    """Of the Triton that is here. ImportError where there is none, as outside Linux."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def refuse_triton(device: torch.device) -> None:
    """ValueError where Triton's kernels cannot run, or Triton cannot compile attention for the GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if device.type != "cuda":
        raise ValueError(
            "attention_backend='triton' needs an NVIDIA GPU; on a CPU use 'torch', or start Python with the "
            "environment variable TRITON_INTERPRET=1, which runs the kernels line by line, and slowly"
        )
    version = triton_version()
    if version in TRITON_FROM and torch.cuda.get_device_capability(device) < TRITON_FROM[version]:
        raise ValueError(
            f"attention_backend='triton' cannot be compiled for {torch.cuda.get_device_name(device)} by Triton "
            f"{version[0]}.{version[1]}; Triton 3.2 came with PyTorch 2.6, 3.3 with 2.7: install another, or use "
            "'torch'"
        )


FLASH_INSTEAD = (
    "install flash-attn 2 as docs/api.md says, 'pip install --no-build-isolation -e \".[flash]\"', or use 'triton'"
)


def refuse_flash_attention(
    device: torch.device, dtype: torch.dtype | None, block_size: int | None, head_dim: int | None
) -> None:
    """ValueError for what FlashAttention 2 cannot do; it would say so itself, in the middle of the first step."""
    needs = "attention_backend='flash_attn' needs"
    if device.type != "cuda":
        raise ValueError(f"{needs} an NVIDIA GPU; on a CPU use 'torch'")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise ValueError(
            f"{needs} a GPU of compute capability 8.0 (Ampere) or more, and this one has "
            f"{capability[0]}.{capability[1]}; use 'triton'"
        )
    if dtype == torch.float32:
        raise ValueError(f"{needs} 16-bit numbers, not float32; say dtype='bfloat16', or use 'triton'")
    if block_size is not None and block_size % 256:
        raise ValueError(f"{needs} blocks of 256 tokens, not {block_size}; say block_size=256, or use 'triton'")
    if head_dim is not None and (head_dim > 256 or head_dim % 8):
        raise ValueError(
            f"{needs} heads of at most 256 numbers, in multiples of 8; this model's have {head_dim}; use 'triton'"
        )


@cache
def fused_layers(dtype: torch.dtype) -> ModuleType | None:
    """The small operations of a layer as Triton kernels; None where they, or the sampler's, do not work with `dtype`.

    For tensors on a GPU only. They are tried once, with small sizes, on the GPU that is torch's current one.
    """
    try:
        layers, sampler = (import_module(f"nanovllm.kernels.triton_{name}") for name in ("layers", "sampler"))
        check = import_module("nanovllm.kernels.check")  # which imports the layers, and they import this
        check.check_small_kernels(layers, sampler, dtype, "cuda")
        return layers
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a driver may raise
        logger.warning("Triton does not work here, small operations and the sampler take PyTorch's kernels: %s", error)
        return None
