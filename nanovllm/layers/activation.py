"""The nonlinearity of the feed-forward layer."""

import torch
import torch.nn.functional as F

from nanovllm.kernels import fused_layers


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer"): silu(gate) * up.

    `gate_up` is `[num_tokens, 2 * size]`, both halves of one matrix product; returns `[num_tokens, size]`.
    """
    if gate_up.is_cuda and (fused := fused_layers(gate_up.dtype)):
        return fused.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
