"""Attention backends: one small interface, several ways to compute it.

A backend is a module with four functions; `torch_attention` is the reference, written to be read:

    allocate(num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype, device)   the KV cache
    plan(context, k_cache)                                  what can be worked out once a step, for all layers
    store(key, value, k_cache, v_cache, slot_mapping)       keep the step's new keys and values
    attend(query, k_cache, v_cache, context, scale)         attention of the new tokens to all before them
"""

from importlib import import_module
from types import ModuleType

BACKENDS = {"torch": "nanovllm.kernels.torch_attention"}


def get_backend(name: str) -> ModuleType:
    """The attention backend called `name`. ValueError if there is none."""
    if name not in BACKENDS:
        raise ValueError(f"attention_backend must be one of {', '.join(map(repr, BACKENDS))}, not {name!r}")
    return import_module(BACKENDS[name])
