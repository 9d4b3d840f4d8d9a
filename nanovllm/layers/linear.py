"""Matrix products, which are nearly all of a model's work.

A decode step reads every weight once and does little with it, so its time is that of reading them. Two things help on a
CPU. Products with the same input are *merged* into one (query, key and value; gate and up). And weights are *packed*
when they are loaded, into the blocked layout that the CPU's matrix kernel wants; otherwise it would copy them into that
layout in every call.

Several ranks share a product in one of two ways (Shoeybi et al. 2019, "Megatron-LM"). *Column parallel*: each computes
some of the outputs, from all inputs. *Row parallel*: each has some of the inputs, and what it makes of them is summed.
(The names are those of the matrix that x is multiplied with, which is the weight transposed.) A row-parallel layer
takes what a column-parallel one before it gave, so that the two together need one exchange, the sum.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.utils.ranks import Ranks

# The number of rows that packed weights are laid out for. From 32 on the layout is the same, and good for any number;
# with a hint of 1, products of a few rows take up to twice as long.
PACK_ROWS = 64

# See `linear_in_float32`.
FLOAT32_ROWS = 12
FLOAT32_SLICE = 4096


class Linear(nn.Module):
    """y = x W^T + b. The weight is `[out_features, in_features]`, as in PyTorch and in checkpoints."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight: torch.Tensor = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.packed: torch.Tensor | None = None  # takes the weight's place on a CPU

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` is `[num_tokens, in_features]`; returns `[num_tokens, out_features]`."""
        return self.product(x, self.bias)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        if len(x) >= FLOAT32_ROWS and x.dtype != torch.float32 and not x.is_cuda:
            return linear_in_float32(x, self.weight, bias)
        return F.linear(x, self.weight, bias)

    def prepack(self) -> None:
        """Pack the weight for this CPU and let the original go; nothing where this CPU or PyTorch cannot."""
        self.packed = pack(self.weight)
        if self.packed is not None:
            del self.weight


class ColumnParallelLinear(Linear):
    """Several products of the same input in one: query, key and value, or gate and up. A rank has some outputs of each.

    `parts` says how many heads each has, under the name that it has in a checkpoint, and `head_dim` how many outputs a
    head has, which stay together; gate and up have heads of one. The outputs of the parts stand side by side.
    """

    def __init__(
        self, in_features: int, parts: dict[str, int], head_dim: int, ranks: Ranks, bias: bool = False
    ) -> None:
        super().__init__(in_features, sum(len(ranks.share(n)) for n in parts.values()) * head_dim, bias)
        self.parts, self.head_dim, self.ranks = parts, head_dim, ranks


class RowParallelLinear(Linear):
    """A product whose inputs are shared out, as a `ColumnParallelLinear` left them; its output is whole everywhere."""

    def __init__(self, in_features: int, out_features: int, ranks: Ranks, bias: bool = False) -> None:
        super().__init__(len(ranks.share(in_features)), out_features, bias)
        self.in_features, self.inputs, self.ranks = in_features, ranks.share(in_features), ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` is `[num_tokens, in_features / ranks]`; returns `[num_tokens, out_features]`."""
        if self.ranks.size == 1:
            return self.product(x, self.bias)
        y = self.ranks.all_reduce(self.product(x, None))
        return y if self.bias is None else y.add_(self.bias)  # once, not once a rank


def linear_in_float32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A product of many rows in bfloat16 or float16 on a CPU that has no arithmetic for them.

    PyTorch's own takes as long for each row as for the first. To convert the weight in every call takes as long as some
    ten rows, and then the product is as fast as in float32. Slice by slice, so that the copy stays in the CPU's cache.
    """
    x = x.float()
    output = torch.cat([F.linear(x, rows.float()) for rows in weight.split(FLOAT32_SLICE)], dim=-1).to(weight.dtype)
    return output if bias is None else output.add_(bias)


def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """`weight` in oneDNN's blocked layout, or None where this PyTorch or this CPU has none for its dtype."""
    reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if reorder is None or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    try:
        return reorder(weight, PACK_ROWS)
    except RuntimeError:  # bfloat16 on a CPU without AVX-512, for instance
        return None
