"""Where a step's time goes on a GPU, by what its kernels are for."""

from collections.abc import Callable
from typing import Any

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


def kind_of(kernel: str) -> str:
    return next((kind for part, kind in KINDS.items() if part in kernel), "rest")


def where_time_goes(step: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of a step's kernels by kind, the longest first, and how many kernels there are: means of a few steps."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    milliseconds: dict[str, float] = {}
    for kernel in kernels:
        kind = kind_of(kernel.name)
        milliseconds[kind] = milliseconds.get(kind, 0.0) + kernel.time_range.elapsed_us() / 1000 / STEPS
    longest_first = sorted(milliseconds.items(), key=lambda item: -item[1])
    return {
        "kernels": round(len(kernels) / STEPS),
        "kernels_ms": round(sum(milliseconds.values()), 3),
        "by_kind_ms": {kind: round(ms, 3) for kind, ms in longest_first},
    }
