"""Attention backends: one small interface, several ways to compute it.

A backend is a module with four functions; `torch_attention` is the reference, written to be read:

    allocate(num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype, device)   the KV cache
    plan(context, k_cache)                                  what can be worked out once a step, for all layers
    store(key, value, k_cache, v_cache, slot_mapping)       keep the step's new keys and values
    attend(query, k_cache, v_cache, context, scale)         attention of the new tokens to all before them
"""

import logging
import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

BACKENDS = {"torch": "nanovllm.kernels.torch_attention", "triton": "nanovllm.kernels.triton_attention"}


def get_backend(name: str, device: torch.device | str = "cpu") -> ModuleType:
    """The attention backend called `name`. ValueError if there is none, or it does not run on `device`."""
    if name not in BACKENDS:
        raise ValueError(f"attention_backend must be one of {', '.join(map(repr, BACKENDS))}, not {name!r}")
    if name == "triton" and torch.device(device).type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "attention_backend='triton' needs an NVIDIA GPU; on a CPU use 'torch', or start Python with the environment "
            "variable TRITON_INTERPRET=1, which runs the kernels line by line, and slowly"
        )
    try:
        return import_module(BACKENDS[name])
    except ImportError as error:
        raise ValueError(f"attention_backend={name!r} cannot be imported here: {error}; use 'torch'") from error


@cache
def fused_layers() -> ModuleType | None:
    """The small operations of a layer as Triton kernels; None where Triton does not work. For tensors on a GPU only."""
    try:
        module = import_module("nanovllm.kernels.triton_layers")
        ones = torch.ones(1, 16, device="cuda")
        module.rms_norm(ones, ones[0], 1e-6)
        return module
    except Exception as error:  # whatever a compiler or a driver may raise
        logger.warning("Triton does not work here, norms and activations take PyTorch's kernels: %s", error)
        return None
