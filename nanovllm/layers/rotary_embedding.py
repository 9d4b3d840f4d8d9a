"""Rotary position embedding (Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding").

Each pair of dimensions (i, i + head_dim / 2) of a query or key is rotated by an angle that grows with its position,
fast for the first pairs and slowly for the last. Their product then depends on the distance of two tokens alone.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from nanovllm.kernels import fused_layers
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.utils.checkpoint import head_dim_of

ROPE_TYPES = ("default", "linear", "llama3")


class RotaryEmbedding(nn.Module):
    """The rotations of a step's tokens. They are the same in all layers, so a model computes them once a step."""

    inverse_frequencies: torch.Tensor  # [head_dim / 2] float32: radians per token

    def __init__(self, hf_config: PretrainedConfig) -> None:
        super().__init__()
        inverse_frequencies = rope_inverse_frequencies(rope_settings(hf_config), head_dim_of(hf_config))
        self.register_buffer("inverse_frequencies", inverse_frequencies, persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for `rotate`, `[num_tokens, 1, head_dim]` each; `positions` is `[num_tokens]`."""
        angles = positions[:, None, None] * self.inverse_frequencies  # [num_tokens, 1, head_dim / 2]
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate every head of `x`, `[num_tokens, any number of heads, head_dim]`.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin): rolling by half a head puts b in a's place and a in b's, and
    the minus is in the first half of `sin`.
    """
    if x.is_cuda and (fused := fused_layers(x.dtype)):
        return fused.rotate(x, cos, sin)
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


def norm_and_rotate(
    qk: torch.Tensor, q_norm: RMSNorm, k_norm: RMSNorm, num_queries: int, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Normalise every head, then rotate it: queries and keys of models with QK norm (Henry et al. 2020, "Query-Key
    Normalization for Transformers").

    `qk` is `[num_tokens, num_queries + num_keys, head_dim]`; so is what it returns. On a GPU all of it is one kernel.
    """
    if qk.is_cuda and (fused := fused_layers(qk.dtype)):
        return fused.rotate(qk, cos, sin, num_queries, q_norm.weight, k_norm.weight, q_norm.eps)
    q, k = qk[:, :num_queries], qk[:, num_queries:]
    return rotate(torch.cat((q_norm(q), k_norm(k)), dim=1), cos, sin)


def rope_settings(hf_config: PretrainedConfig) -> dict[str, Any]:
    """RoPE's settings, wherever the installed transformers keeps them; always with "rope_type" and "rope_theta"."""
    settings = getattr(hf_config, "rope_parameters", None)  # transformers 5
    if settings is None:
        settings = {"rope_theta": hf_config.rope_theta} | (hf_config.rope_scaling or {})
    rope_type = settings.get("rope_type") or settings.get("type") or "default"  # "type" in old checkpoints
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"RoPE type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    return settings | {"rope_type": rope_type}


def rope_inverse_frequencies(settings: dict[str, Any], head_dim: int) -> torch.Tensor:
    """Radians per token of each pair of dimensions, `[head_dim / 2]` float32, scaled for longer contexts if asked."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse_frequencies = 1.0 / settings["rope_theta"] ** exponents
    if settings["rope_type"] == "default":
        return inverse_frequencies
    slow = inverse_frequencies / settings["factor"]
    # Chen et al. 2023, "Extending Context Window of LLMs via Position Interpolation"
    if settings["rope_type"] == "linear":
        return slow
    # Llama 3.1: pairs that turned often within the original context keep their speed, those that hardly turned are
    # slowed down, and in between there is a smooth passage.
    turns = settings["original_max_position_embeddings"] * inverse_frequencies / (2 * math.pi)
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    fast = ((turns - low) / (high - low)).clamp(0, 1)
    return fast * inverse_frequencies + (1 - fast) * slow
