"""Single kernels on a GPU: attention, backend by backend, the sampler, and what lies between the products of a layer.

They are replayed from CUDA graphs, so that nobody waits for Python. Attention and the sampler go over more data than
the GPU's cache holds, as in a step, where every layer has a KV cache of its own; the rest finds what the kernel before
has left.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from nanovllm.bench.report import Report, gpu_record
from nanovllm.bench.timing import seconds_on_gpu
from nanovllm.engine.kv_cache import block_bytes
from nanovllm.kernels import get_backend
from nanovllm.utils.context import Context

DECODES = [(256, 1024), (64, 1024), (16, 1024), (1, 1024), (1, 4096)]  # sequences, tokens of context
PREFILLS = [(8, 1024), (16, 1024), (1, 8192)]  # prompts, tokens of each
MAX_LEN = 4096  # what block tables have room for in decodes, as in an engine with this `max_model_len`
BLOCK_SIZES = {"triton": 16, "flash_attn": 256}  # the torch backend asks the GPU what to do: no graph can hold it
SAMPLED = [(256, 0.0), (256, 0.6), (16, 0.0), (16, 0.6)]  # rows, temperature
FUSED_ROWS = (1, 16, 256, 8192)  # tokens
GPU_CACHE = 256 << 20  # bytes: more than any GPU's
REPEATS = 16  # in a graph, whose own launch takes some microseconds

Heads = tuple[int, int, int]  # query heads, KV heads, numbers in each


class Limits(NamedTuple):
    """What a GPU does at best: bytes a second of a copy, read and written, and operations a second of a product."""

    bandwidth: float
    rate: float
    dtype: torch.dtype  # of the product, and of all that is measured against it


def measure_kernels(report: Report, limits: Limits, model: dict[str, Any]) -> None:
    """Attention of every backend that is here, then the sampler. `model` is a config.json, for the sizes."""
    dtype = limits.dtype
    heads: Heads = (model["num_attention_heads"], model["num_key_value_heads"], model["head_dim"])
    num_heads, num_kv_heads, head_dim = heads
    for backend_name, block_size in BLOCK_SIZES.items():
        try:
            backend = get_backend(backend_name, "cuda", dtype, block_size, head_dim)
        except ValueError as error:
            report.progress(f"without {backend_name}: {error}")
            continue
        for n, context_len in DECODES:
            name = f"decode attention, {backend_name}, {n} x {context_len}"
            report.progress(name)
            seconds = attention_seconds(backend, heads, n, 1, context_len, block_size, dtype)
            num_bytes = n * context_len * block_bytes(1, 1, num_kv_heads, head_dim, dtype)
            add_reading(report, name, seconds, num_bytes, limits)
        for n, prompt_len in PREFILLS:
            name = f"prefill attention, {backend_name}, {n} x {prompt_len}"
            report.progress(name)
            seconds = attention_seconds(backend, heads, n, prompt_len, prompt_len, block_size, dtype)
            operations = 4 * num_heads * head_dim * n * prompt_len * (prompt_len + 1) / 2
            about = {
                "us": round(1e6 * seconds, 1),
                "share_of_the_product": round(operations / seconds / limits.rate, 3),
            }
            report.add(gpu_record(name, operations / seconds / 1e12, "TFLOP/s", dtype) | about)

    for n, temperature in SAMPLED:
        name = f"sampler, {n} rows, temperature {temperature}"
        report.progress(name)
        seconds = sampler_seconds(n, model["vocab_size"], temperature, dtype)
        add_reading(report, name, seconds, n * model["vocab_size"] * dtype.itemsize, limits)


@torch.inference_mode()
def measure_fused(report: Report, limits: Limits, model: dict[str, Any]) -> None:
    """The small operations of a layer: our kernels, and what torch.compile makes of the same in plain PyTorch."""
    for name, operation in small_operations(model, limits.dtype, "cuda").items():
        compiled = torch.compile(operation.plain, dynamic=False)
        for how, kernel in {"ours": operation.ours, "torch.compile": compiled}.items():
            for n in FUSED_ROWS:
                measurement = f"{name}, {how}, {n} tokens"
                report.progress(measurement)
                seconds = seconds_in_a_graph(partial(kernel, *operation.inputs(n)))
                add_reading(report, measurement, seconds, n * operation.numbers * limits.dtype.itemsize, limits)


@dataclass
class Operation:
    """Something small that a layer does between its products."""

    ours: Callable[..., torch.Tensor]
    plain: Callable[..., torch.Tensor]
    inputs: Callable[[int], list[torch.Tensor]]  # at random, for so many tokens
    numbers: int  # that a token reads and writes


def small_operations(model: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Operation]:
    """Those of a layer of Qwen3; `model` is a config.json, for the sizes."""
    from nanovllm.kernels import triton_layers  # there is no Triton outside Linux

    hidden, size, head_dim = model["hidden_size"], model["intermediate_size"], model["head_dim"]
    num_queries, num_keys = model["num_attention_heads"], model["num_key_value_heads"]
    num_heads, eps = num_queries + num_keys, model["rms_norm_eps"]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        row = x.float()
        return (row * torch.rsqrt(row.pow(2).mean(-1, keepdim=True) + eps)).to(dtype) * weight

    def add_and_norm(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        x += delta
        return norm(x, weight)

    def norm_and_rotate(qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k = qk[:, :num_queries], qk[:, num_queries:]
        qk = torch.cat((norm(q, q_weight), norm(k, k_weight)), dim=1)
        return qk * cos + qk.roll(head_dim // 2, dims=-1) * sin

    def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    weight, q_weight, k_weight = random(hidden), random(head_dim), random(head_dim)

    def heads_and_angles(n: int) -> list[torch.Tensor]:
        angles = random(n, 1, head_dim // 2)
        cos, sin = angles.cos(), angles.sin()
        return [random(n, num_heads, head_dim), torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)]

    return {
        "sum and norm": Operation(
            lambda x, delta: triton_layers.rms_norm(x, weight, eps, delta),
            add_and_norm,
            lambda n: [random(n, hidden), random(n, hidden)],
            4 * hidden,
        ),
        "QK norm and rotation": Operation(
            lambda qk, cos, sin: triton_layers.rotate(qk, cos, sin, num_queries, q_weight, k_weight, eps),
            norm_and_rotate,
            heads_and_angles,
            2 * (num_heads + 1) * head_dim,
        ),
        "activation": Operation(triton_layers.silu_and_mul, silu_and_mul, lambda n: [random(n, 2 * size)], 3 * size),
    }


def add_reading(report: Report, name: str, seconds: float, num_bytes: int, limits: Limits) -> None:
    """Record a kernel that takes as long as it reads, at best."""
    floor = num_bytes / limits.bandwidth
    about = {"floor_us": round(1e6 * floor, 1), "times_the_floor": round(seconds / floor, 2)}
    report.add(gpu_record(name, 1e6 * seconds, "us", limits.dtype) | about)


@torch.inference_mode()
def attention_seconds(
    backend: ModuleType, heads: Heads, n: int, query_len: int, context_len: int, block_size: int, dtype: torch.dtype
) -> float:
    """Seconds of one layer's attention for `n` sequences with so many new tokens and so long a context each."""
    num_heads, num_kv_heads, head_dim = heads
    num_blocks = -(-context_len // block_size)
    context = Context(
        block_size=block_size,
        num_decodes=n if query_len == 1 else 0,
        query_start=torch.arange(n + 1, dtype=torch.int32, device="cuda") * query_len,
        context_lens=torch.full((n,), context_len, dtype=torch.int32, device="cuda"),
        block_tables=torch.zeros(n, max(num_blocks, MAX_LEN // block_size), dtype=torch.int32, device="cuda"),
        slot_mapping=torch.zeros(n * query_len, dtype=torch.int64, device="cuda"),
    )
    context.block_tables[:, :num_blocks] = torch.randperm(n * num_blocks, device="cuda").view(n, num_blocks)
    query = torch.randn(n * query_len, num_heads, head_dim, dtype=dtype, device="cuda")
    shape = (block_size, num_kv_heads, head_dim)
    num_layers = 1 + GPU_CACHE // (n * num_blocks * block_bytes(1, *shape, dtype)) if query_len == 1 else 1
    layers = backend.allocate(num_layers, n * num_blocks, *shape, dtype, "cuda").transpose(0, 1)
    layers.normal_()
    context.plan = backend.plan(context, layers[0, 0])

    def all_layers() -> None:
        for k_cache, v_cache in layers:
            backend.attend(query, k_cache, v_cache, context, head_dim**-0.5)

    return seconds_in_a_graph(all_layers) / num_layers


@torch.inference_mode()
def sampler_seconds(n: int, vocab_size: int, temperature: float, dtype: torch.dtype) -> float:
    """Seconds to sample a token for each of `n` rows of logits."""
    from nanovllm.kernels.triton_sampler import sample  # there is no Triton outside Linux

    num_batches = 1 + GPU_CACHE // (n * vocab_size * dtype.itemsize)
    batches = torch.randn(num_batches, n, vocab_size, dtype=dtype, device="cuda")
    temperatures = torch.full((n,), temperature, device="cuda")
    bits = torch.randint(1 << 62, (n,), device="cuda")

    def all_batches() -> None:
        for logits in batches:
            sample(logits, temperatures, bits)

    return seconds_in_a_graph(all_batches) / num_batches


def seconds_in_a_graph(work: Callable[[], Any]) -> float:
    """Seconds of some work on the GPU, replayed from a CUDA graph that holds it several times."""
    work()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            work()
    return seconds_on_gpu(graph.replay) / REPEATS
