"""Ranks: the processes that share one model, each with a part of every large matrix on a device of its own.

This is tensor parallelism (Shoeybi et al. 2019, "Megatron-LM"). Every rank computes every step, on its part; where a
layer needs the whole, the ranks talk, through `torch.distributed`: NCCL between GPUs, gloo between CPUs.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass(slots=True)
class Traffic:
    """What one kind of exchange has come to. A CUDA graph's replay does not count, for Python does not see it."""

    calls: int = 0
    bytes: int = 0  # of the tensors that this rank gave, not of what a link had to carry for them

    def count(self, x: torch.Tensor) -> None:
        self.calls += 1
        self.bytes += x.nbytes


@dataclass(slots=True)
class Ranks:
    """All ranks of a model, as one of them sees them. Layers hold it; alone, they have no one to talk to."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    traffic: dict[str, Traffic] = field(default_factory=lambda: {"all_reduce": Traffic(), "all_gather": Traffic()})

    def share(self, count: int) -> range:
        """Which of `count` heads, rows or columns are this rank's: as many as every other's, one after the other.

        Where there are fewer of them than ranks, each is copied to several, and a rank has one.
        """
        first = self.rank * count // self.size
        return range(first, first + max(1, count // self.size))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x`, in its place."""
        if self.size > 1:
            self.traffic["all_reduce"].count(x)
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' `x` side by side, `[..., size * n]` from `[..., n]` each."""
        if self.size == 1:
            return x
        self.traffic["all_gather"].count(x)
        with torch.inference_mode(False):  # gloo fills them in a thread of its own, which PyTorch 2.4 would forbid
            parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest of all ranks' numbers."""
        if self.size == 1:
            return number
        least = torch.tensor(number, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.group)
        return int(least)
