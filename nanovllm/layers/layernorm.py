"""RMSNorm (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization")."""

import torch
from torch import nn

from nanovllm.kernels import fused_layers


class RMSNorm(nn.Module):
    """Divides each row by its root mean square, in float32, and multiplies it by a learned weight.

    sqrt(mean(x^2) + eps) is computed as hypot(|x| / sqrt(size), sqrt(eps)): the same in fewer operations. On a CPU it
    is their number that counts, not their size: every layer has two norms, and a decode step has few rows.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        # Scalars as tensors, for speed: a Python number would be converted in every call. They go with any device.
        self.inverse_root_size = torch.tensor(size**-0.5, dtype=torch.float32, device="cpu")
        self.root_eps = torch.tensor(eps**0.5, dtype=torch.float32, device="cpu")

    def forward(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        """`x` is `[..., size]`; returns the same shape and dtype. A `delta` like it is first added to `x`, in place.

        A sum and the norm of it read and write the residual stream once on a GPU, in one kernel instead of two.
        """
        if x.is_cuda and (fused := fused_layers(x.dtype)):
            return fused.rms_norm(x, self.weight, self.eps, delta)
        if delta is not None:
            x += delta
        row = x.float()  # x itself if it is float32 already, so nothing below may be done in place on it
        length = torch.linalg.vector_norm(row, dim=-1, keepdim=True)  # [..., 1]
        rms = torch.hypot(length.mul_(self.inverse_root_size), self.root_eps)
        return (row / rms).to(x.dtype).mul_(self.weight)
