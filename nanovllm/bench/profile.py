"""Where time goes on a GPU, by what its kernels are for."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

# What a kernel is for, by a part of its name; the first that fits.
KINDS = {
    "attend_kernel": "attention",
    "combine_kernel": "attention",
    "flash_fwd": "attention",
    "store_kernel": "storing keys and values",
    "rms_norm_kernel": "sums and norms",
    "rotate_kernel": "QK norms and rotation",
    "silu_and_mul_kernel": "activation",
    "weigh_kernel": "sampler",
    "choose_kernel": "sampler",
    "nvjet": "products",  # cuBLAS has many names for its matrix products
    "gemm": "products",
    "gemv": "products",
    "cutlass": "products",
    "cublas": "products",
}
STEPS = 3

BATCHES = (16, 32, 64, 128, 256)  # steps are told apart by the number of their sequences: up to 16, up to 32, ...


def kind_of(kernel: str) -> str:
    return next((kind for part, kind in KINDS.items() if part in kernel), "rest")


class Kernel(NamedTuple):
    """One that the GPU has run."""

    name: str
    milliseconds: float


def kernels_of(work: Callable[[], Any]) -> list[Kernel]:
    """The kernels of some work, in the order in which they began."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    return [Kernel(event.name, event.time_range.elapsed_us() / 1000) for event in events]


def by_kind(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Milliseconds of kernels by what they are for, the longest first."""
    milliseconds: dict[str, float] = {}
    for kernel in kernels:
        kind = kind_of(kernel.name)
        milliseconds[kind] = milliseconds.get(kind, 0.0) + kernel.milliseconds
    return dict(sorted(milliseconds.items(), key=lambda item: -item[1]))


def where_time_goes(step: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of a step's kernels by kind, and how many kernels there are: means of a few steps."""
    kernels = kernels_of(lambda: [step() for _ in range(STEPS)])
    milliseconds = {kind: ms / STEPS for kind, ms in by_kind(kernels).items()}
    return {
        "kernels": round(len(kernels) / STEPS),
        "kernels_ms": round(sum(milliseconds.values()), 3),
        "by_kind_ms": {kind: round(ms, 3) for kind, ms in milliseconds.items()},
    }


class DecodeStep(NamedTuple):
    """What a step of decodes alone asks of attention."""

    num_seqs: int
    floor_ms: float  # for all layers


def attention_by_batch(
    kernels: Iterable[Kernel], steps: list[DecodeStep | None], num_layers: int
) -> list[dict[str, Any]]:
    """Attention in a run, beside its floor, for few sequences and for many.

    `kernels` are those of the whole run, `steps` all its steps, None for one with prompts in it. Every layer of every
    step launches one `attend_kernel`, perhaps with a `combine_kernel` behind it.
    """
    attention: list[float] = []  # milliseconds, for every layer of every step
    for kernel in kernels:
        if kernel.name.startswith("attend_kernel"):
            attention.append(kernel.milliseconds)
        elif kernel.name.startswith("combine_kernel"):
            attention[-1] += kernel.milliseconds
    assert len(attention) == num_layers * len(steps), f"{len(attention)} layers attend in {len(steps)} steps"
    spent = [sum(attention[i * num_layers : (i + 1) * num_layers]) for i in range(len(steps))]
    rows = []
    for first, last in zip((1, *(n + 1 for n in BATCHES)), BATCHES):
        chosen = [(ms, step.floor_ms) for ms, step in zip(spent, steps) if step and first <= step.num_seqs <= last]
        if chosen:
            ms, floor_ms = (sum(column) for column in zip(*chosen))
            row = {"sequences": [first, last], "steps": len(chosen), "ms": round(ms, 1), "floor_ms": round(floor_ms, 1)}
            rows.append(row | {"times_the_floor": round(ms / floor_ms, 3)})
    return rows
