"""FlashAttention 2 (Dao 2023) as a backend: the kernels are flash_attn's, ours is to tell them what is where.

Its kernels do what ours do, and are written in CUDA for NVIDIA's GPUs from Ampere on: tile after tile of keys and
values passes through fast memory, and no matrix of scores is ever stored. They follow block tables, too, but a tile has
up to 256 tokens and must lie in one block, so `block_size` has to be a multiple of 256. The price is paid in the prefix
cache: it keeps full blocks, and a prompt of 200 tokens never fills one.

Decodes and chunks take a call each, because only in a call in which every sequence has a single query does the library
share what is read between the query heads of a KV head, and split long contexts. How it splits them depends on the GPU,
the batch and the width of the block tables. So the last bits of a sequence's numbers depend on who else is in the
batch; with the Triton backend they do not.

All this was read in the sources of flash-attn 2.8.3 (`flash_attn_interface.py`, `flash_api.cpp`, `flash_fwd_kernel.h`);
block tables for chunks came with 2.5.7. No other file imports it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

from nanovllm.kernels.torch_attention import allocate, store
from nanovllm.utils.context import Context

__all__ = ["allocate", "attend", "plan", "store"]


def plan(context: Context, k_cache: torch.Tensor) -> dict[str, Any]:
    """What the call for the chunks must be told, the same in all layers; nothing if there are only decodes.

    Sequences are told apart by where each begins: `[0, 5, 12]` is one of five tokens and one of seven. Programs are
    launched for `max_seqlen_q` queries in every sequence, so that must be a Python number: one number comes back from
    the GPU, once a step. A CUDA graph cannot wait for it, and need not, since all its rows are decodes.
    """
    n = context.num_decodes  # their queries are the first n rows of the batch
    if n == len(context.context_lens):
        return {}
    starts = context.query_start[n:] - n
    return {
        "cu_seqlens_q": starts,
        "cu_seqlens_k": F.pad(context.context_lens[n:].cumsum(0, dtype=torch.int32), (1, 0)),
        "max_seqlen_q": int(starts.diff().max()),
        "max_seqlen_k": context.block_tables.size(1) * context.block_size,  # as many as a block table can hold
        "block_table": context.block_tables[n:],
    }


def attend(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context: Context,
    scale: float,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each new token to all tokens of its sequence up to itself; written to `output` if there is one.

    `query` and the result are `[num_tokens, num_heads, head_dim]`, the caches are one layer's, `[blocks, block_size,
    num_kv_heads, head_dim]`, and hold the new tokens already. NaN in slots that hold no token does no harm: the kernels
    mask their scores, and put zeros in the place of their values.
    """
    n, parts = context.num_decodes, []
    if n:  # the only query of each is its last token, which sees all: there is nothing to mask
        lens, tables = context.context_lens[:n], context.block_tables[:n]
        attended = flash_attn_with_kvcache(  # takes and gives [n, 1, num_heads, head_dim]
            query[:n].unsqueeze(1), k_cache, v_cache, cache_seqlens=lens, block_table=tables, softmax_scale=scale
        )
        parts.append(attended.squeeze(1))
    if context.plan:  # causal: the last query of a chunk sees the whole context, the one before it one token less
        attended = flash_attn_varlen_func(query[n:], k_cache, v_cache, softmax_scale=scale, causal=True, **context.plan)
        parts.append(attended)
    return parts[0] if len(parts) == 1 and output is None else torch.cat(parts, out=output)
