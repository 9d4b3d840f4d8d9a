"""The attention layer: where a model meets the KV cache."""

from types import ModuleType

import torch
from torch import nn

from nanovllm.utils.context import get_context


class Attention(nn.Module):
    """Stores a step's new keys and values in the KV cache, then attends to all that the cache holds of each sequence.

    All new K/V are stored before anybody attends: sequences of one step may share blocks that this very step fills.
    """

    def __init__(self, num_heads: int, head_dim: int, scale: float, num_kv_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = scale
        self.num_kv_heads = num_kv_heads

    def bind(self, backend: ModuleType, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """Use `backend` on this layer's part of the cache, `[blocks, block_size, num_kv_heads, head_dim]` each."""
        self.backend = backend
        self.k_cache = k_cache
        self.v_cache = v_cache

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """`query` is `[num_tokens, num_heads, head_dim]`, `key` and `value` `[num_tokens, num_kv_heads, head_dim]`.

        Returns `[num_tokens, num_heads * head_dim]`.
        """
        context = get_context()
        if context.plan is None:  # the first layer plans for all
            context.plan = self.backend.plan(context, self.k_cache)
        self.backend.store(key, value, self.k_cache, self.v_cache, context.slot_mapping)
        return self.backend.attend(query, self.k_cache, self.v_cache, context, self.scale).flatten(1)
