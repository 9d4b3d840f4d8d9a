"""FlashAttention's functions on a CPU: what the documentation of flash_attn 2.8.3 says, in plain float64.

They refuse what the real ones refuse (`csrc/flash_attn/flash_api.cpp`) as far as a backend could get it wrong, and
leave NaN where the real ones would leave memory as it was. They read only the slots of the context, so what they can
show of NaN in the KV cache is that the backend points nowhere else; what the kernels make of the rest of a tile, a GPU
must show.
"""

import importlib.util
import sys
from functools import cache
from types import ModuleType
from unittest.mock import patch

import torch

from nanovllm.kernels import BACKENDS

DTYPES = (torch.float16, torch.bfloat16)


@cache
def backend() -> ModuleType:
    """`nanovllm/kernels/flash_attention.py` over these functions: a copy, which nobody else gets to see."""
    spec = importlib.util.find_spec(BACKENDS["flash_attn"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, flash_attn=sys.modules[__name__]):
        spec.loader.exec_module(module)
    return module


def check(is_so: bool, what: str) -> None:
    if not is_so:
        raise RuntimeError(what)


def check_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_table: torch.Tensor, *lengths: torch.Tensor
) -> None:
    num_heads, head_size = q.shape[-2:]
    check(q.dtype in DTYPES, "FlashAttention only support fp16 and bf16 data type")
    check(k.dtype == v.dtype == q.dtype, "query, key and value must have the same dtype")
    check(all(x.dtype == torch.int32 for x in (block_table, *lengths)), "tables and lengths must have dtype int32")
    check(all(x.stride(-1) == 1 for x in (q, k, v, block_table)), "must have contiguous last dimension")
    check(all(x.is_contiguous() for x in lengths), "lengths must be contiguous")
    check(k.dim() == 4 and k.shape == v.shape and k.size(3) == head_size, "paged keys and values must have shape (...)")
    check(k.size(1) % 256 == 0, "Paged KV cache block size must be divisible by 256")
    check(head_size <= 256 and head_size % 8 == 0, "head_size must be at most 256 and a multiple of 8")
    check(num_heads % k.size(2) == 0, "Number of heads in key/value must divide number of heads in query")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    context_len: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """One sequence: `q` is [query_len, num_heads, head_size], `block_table` its own."""
    position = torch.arange(context_len)
    page_size, group = k.size(1), q.size(1) // k.size(2)
    slots = block_table[position // page_size] * page_size + position % page_size
    key, value = (x.flatten(0, 1)[slots].double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), key) * scale
    if causal:  # aligned to the bottom right corner: the last query sees all
        last_seen = torch.arange(len(q)).unsqueeze(1) + context_len - len(q)
        scores = scores.masked_fill(position > last_seen, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).to(q.dtype)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """`q` is [batch, seqlen, heads, head_size], every sequence has as many queries."""
    check_inputs(q, k_cache, v_cache, block_table, cache_seqlens)
    check(len(cache_seqlens) == len(block_table) == len(q) > 0, "as many lengths and tables as sequences")
    parts = zip(q, block_table, cache_seqlens.tolist())
    return torch.stack([attention(x, k_cache, v_cache, table, n, softmax_scale, causal) for x, table, n in parts])


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool = False,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """`q` is [total_q, heads, head_size], sequence after sequence; `cu_seqlens_*` tell where each begins and ends."""
    check_inputs(q, k, v, block_table, cu_seqlens_q, cu_seqlens_k)
    check(type(max_seqlen_q) is type(max_seqlen_k) is int, "incompatible function arguments")
    check(len(cu_seqlens_q) == len(cu_seqlens_k) == len(block_table) + 1 > 1, "one length more than sequences")
    starts, context_lens = cu_seqlens_q.tolist(), cu_seqlens_k.diff().tolist()
    check(starts[0] == 0 == int(cu_seqlens_k[0]) and starts[-1] == len(q), "the real one would read past the end")
    check(max(context_lens) <= max_seqlen_k, "the real one would leave keys out")
    output = torch.full_like(q, float("nan"))
    for table, start, end, context_len in zip(block_table, starts, starts[1:], context_lens):
        part = attention(q[start:end], k, v, table, context_len, softmax_scale, causal)
        output[start:end][:max_seqlen_q] = part[:max_seqlen_q]  # no programs are launched for the others
    return output
