"""Paged attention as two Triton kernels of our own, for GPUs; in Triton's interpreter they run on a CPU as well.

A GPU runs a kernel as many *programs* side by side, which know each other only by their numbers. A program of ours
takes one KV head and a few queries of one sequence, follows the sequence's block table, and walks over its keys and
values tile by tile. It never holds more than one tile: the softmax is kept as a running maximum, a running sum and a
running output (the online softmax of Milakov and Gimelshein 2018, as in FlashAttention, Dao et al. 2022).

Three things decide how fast that is:

- The query heads that share a KV head (grouped-query attention) are rows of one program, so keys and values are read
  once for all of them, and the products are matrix products, for which a GPU has units of their own.
- A *decode*, a sequence with one new token, does little arithmetic for each byte that it reads. What counts is that
  enough of the memory is being asked at once. So a long context is *split*: several programs take a piece each, and a
  second kernel adds up what they found (flash-decoding, Dao et al. 2023). The pieces depend on the context alone, never
  on how many others are in the batch, so a decode's sums are made in the same order alone and in a crowd of decodes.
- A *chunk*, a sequence with several new tokens, has arithmetic enough: its queries share what is read, a tile of them
  to a program.

Both kinds go in one launch: chunks do not wait for decodes.
"""

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanovllm.kernels import triton_version
from nanovllm.kernels.torch_attention import allocate
from nanovllm.utils.context import Context

__all__ = ["allocate", "attend", "plan", "store"]

# A decode takes a piece of its context for each so many tokens, and at most so many pieces.
SPLIT_SIZE = 512
MAX_SPLITS = 16

# Tensor cores multiply no fewer rows than this.
MIN_ROWS = 16

# Keys and values of the next tile are on their way while one is computed with. That takes three stages: to look up the
# blocks, to copy from them, to compute.
NUM_STAGES = 3

LOG2_E = 1.4426950408889634

# Before 3.3 Triton copies nothing ahead in a loop with a condition in it: there keys are hidden in every tile.
MASKS_ALL = tl.constexpr(triton_version() < (3, 3))

# Triton's interpreter reads a bfloat16 product's operands as whole numbers: there they become float32 first.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@dataclass(frozen=True, slots=True)
class Plan:
    """How a step's work is cut into programs."""

    rows: int  # of a program: new tokens times the query heads that share a KV head
    tile: int  # tokens whose keys and values a program looks at in one go
    warps: int  # groups of 32 threads that share a program's work
    max_splits: int  # pieces of the longest context that a block table of this width can hold


def plan(context: Context, k_cache: torch.Tensor) -> Plan:
    """The sizes of a step's programs; `k_cache` is any layer's."""
    capability = torch.cuda.get_device_capability(k_cache.device) if k_cache.is_cuda else (8, 0)
    has_chunks = len(context.context_lens) > context.num_decodes
    width = context.block_tables.size(1) * context.block_size
    return Plan(
        *program_size(k_cache.size(3), k_cache.dtype, capability, has_chunks),
        max_splits=min(triton.cdiv(width, SPLIT_SIZE), MAX_SPLITS),
    )


def program_size(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int], has_chunks: bool
) -> tuple[int, int, int]:
    """Rows of a program, tokens in a tile, warps.

    With chunks as many as a multiprocessor of this kind has room for. Without, small: many programs, each of which
    waits for memory. On an H200 tiles of 64 for four warps took 2 % longer for 129 to 256 decodes, and a quarter less
    for one.
    """
    if dtype == torch.float32:  # no tensor cores for exact float32: the products are unrolled, and soon too long
        return MIN_ROWS, 32 if head_dim <= 128 else 16, 4
    if not has_chunks:
        return MIN_ROWS, 32, 2
    if head_dim > 128:
        return 32 if capability >= (8, 0) else MIN_ROWS, 32, 4
    return (128, 64, 8) if capability >= (8, 0) else (64, 64, 4)


# -- Keeping keys and values -------------------------------------------------------------------------------------------


def store(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write the new tokens' keys and values, `[num_tokens, num_kv_heads, head_dim]` each, to their slots."""
    key, value = key.flatten(1), value.flatten(1)  # a token's heads lie side by side: nothing is copied
    num_tokens, size = key.shape
    store_kernel[(num_tokens,)](
        *(key, value, k_cache, v_cache, slot_mapping, key.stride(0), value.stride(0)),
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
    )


@triton.jit
def store_kernel(
    key, value, k_cache, v_cache, slot_mapping, key_stride, value_stride, SIZE: tl.constexpr, PADDED: tl.constexpr
):
    """One program a token: all its heads lie side by side, in the batch as in the cache."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)  # int64: slots times numbers a slot do not fit into 32 bits on a large GPU
    i = tl.arange(0, PADDED)
    tl.store(k_cache + slot * SIZE + i, tl.load(key + token * key_stride + i, mask=i < SIZE), mask=i < SIZE)
    tl.store(v_cache + slot * SIZE + i, tl.load(value + token * value_stride + i, mask=i < SIZE), mask=i < SIZE)


# -- Attention ---------------------------------------------------------------------------------------------------------


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
    num_kv_heads, head_dim]`, and hold the new tokens already. Reads nothing but the slots of the sequences themselves.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = k_cache.size(2)
    group = num_heads // num_kv_heads
    num_decodes, num_seqs = context.num_decodes, len(context.context_lens)
    rows, tile, max_splits = context.plan.rows, context.plan.tile, context.plan.max_splits
    rows = max(rows, triton.next_power_of_2(group))

    output = torch.empty_like(query) if output is None else output
    # What the pieces of split contexts give: an output each, and how much it weighs.
    pieces = query.new_empty(num_decodes, num_heads, max_splits, head_dim, dtype=torch.float32)
    weights = query.new_empty(num_decodes, num_heads, max_splits, dtype=torch.float32)
    sizes = dict(
        SPLIT_SIZE=SPLIT_SIZE,
        MAX_SPLITS=MAX_SPLITS,
        HEAD_DIM=head_dim,
        PADDED_DIM=max(16, triton.next_power_of_2(head_dim)),
    )
    # Each sequence has a tile for its first new token, and one more for each so many of the rest: these hold them all.
    num_tiles = num_seqs + (num_tokens - num_seqs) // (rows // group)
    attend_kernel[(num_kv_heads, num_tiles, max_splits if num_decodes else 1)](
        *(query, k_cache, v_cache, output, pieces, weights),
        *(context.query_start, context.context_lens, context.block_tables),
        *(num_decodes, num_seqs, max_splits, scale * LOG2_E),
        *(query.stride(0), query.stride(1), k_cache.stride(1), context.block_tables.stride(0)),
        GROUP=group,
        BLOCK_SIZE=context.block_size,
        ROWS=rows,
        TILE=tile,
        **sizes,
        num_warps=context.plan.warps,
        num_stages=NUM_STAGES,
    )
    if num_decodes and max_splits > 1:
        combine_kernel[(num_decodes, num_heads)](
            *(pieces, weights, output, context.context_lens, max_splits),
            PADDED_SPLITS=triton.next_power_of_2(max_splits),
            **sizes,
            num_warps=1,
        )
    return output


@triton.jit
def split_of(context_len, SPLIT_SIZE: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """How many pieces a context is split into, and how many tokens each has: a multiple of 64."""
    num_splits = tl.minimum(tl.cdiv(context_len, SPLIT_SIZE), MAX_SPLITS)
    split_len = tl.cdiv(tl.cdiv(context_len, num_splits), 64) * 64
    return tl.cdiv(context_len, split_len), split_len  # rounding up may leave nothing for the last


@triton.jit
def first_tile(query_start, seq, TOKENS: tl.constexpr):
    """Where a sequence begins: a tile for each before it, and one for each `TOKENS` of their tokens but the first."""
    return seq + (tl.load(query_start + seq) - seq) // TOKENS


@triton.jit
def chunk_of(tile, query_start, num_decodes, num_seqs, TOKENS: tl.constexpr):
    """The chunk that a tile belongs to, the last that does not begin later: by bisection."""
    seq, end = num_decodes, num_seqs
    while end - seq > 1:
        middle = (seq + end) // 2
        if first_tile(query_start, middle, TOKENS) <= tile:
            seq = middle
        else:
            end = middle
    return seq


@triton.jit
def work_of(tile, query_start, num_decodes, num_seqs, TOKENS: tl.constexpr):
    """A tile's sequence, where in the batch its new tokens start, how many they are, and which is the tile's first."""
    seq, start, query_len, first = tile, tile, 1, 0
    if tile >= num_decodes:  # decodes stand before the chunks, and have a tile each
        seq = chunk_of(tile, query_start, num_decodes, num_seqs, TOKENS)
        start = tl.load(query_start + seq)
        query_len = tl.load(query_start + seq + 1) - start
        first = (tile - first_tile(query_start, seq, TOKENS)) * TOKENS
    return seq, start, query_len, first


@triton.jit
def blocks_of(block_tables, row, tile_begin, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The physical block of each token in a tile of keys; past the end, that of the last token."""
    key_position = tl.minimum(tile_begin + tl.arange(0, TILE), end - 1)
    return tl.load(block_tables + row + key_position // BLOCK_SIZE)


@triton.jit
def scores_of(q, k, key_position, last_seen, has_hidden):
    """Scores of a tile's keys, `[ROWS, TILE]`: -inf where a query may not look, which happens only if `has_hidden`."""
    if MASKS_ALL:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(key_position[None, :] <= last_seen[:, None], scores, float("-inf"))
    else:
        # `tl.dot` adds to `scores`: what begins at -inf stays there. Few rounds have a key to hide, and to ask first
        # makes chunks a fifth faster.
        scores = tl.zeros([q.shape[0], k.shape[0]], tl.float32)
        if has_hidden:
            scores = tl.where(key_position[None, :] <= last_seen[:, None], 0.0, float("-inf"))
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
    return scores


@triton.jit(do_not_specialize=["num_decodes", "num_seqs", "max_splits"])
def attend_kernel(
    query, k_cache, v_cache, output, pieces, weights,
    query_start, context_lens, block_tables,
    num_decodes, num_seqs, max_splits, scale,
    token_stride, head_stride, slot_stride, table_stride,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SPLIT_SIZE: tl.constexpr, MAX_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """One program: a KV head, a tile of new tokens, a piece of the context."""
    TOKENS: tl.constexpr = ROWS // GROUP  # new tokens in a tile
    # The last tiles go first. A chunk's last tile looks back the furthest, and should not be what the rest waits for:
    # on an H200 a prompt of 8,192 tokens took 665 instead of 747 us.
    kv_head, tile, split = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    seq, start, query_len, first = work_of(tile, query_start, num_decodes, num_seqs, TOKENS)
    context_len = tl.load(context_lens + seq)

    # The part of the context that this program walks over: a decode's piece, or all up to the tile's end.
    begin, end = 0, tl.minimum(context_len, context_len - query_len + first + TOKENS)
    num_splits = 1
    if query_len == 1:
        num_splits, split_len = split_of(context_len, SPLIT_SIZE, MAX_SPLITS)
        begin, end = split * split_len, tl.minimum(context_len, (split + 1) * split_len)
    if split >= num_splits or first >= query_len:
        return

    # Row r is new token r // GROUP of the tile, in query head r % GROUP of this KV head's.
    row, dim = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    token, head = first + row // GROUP, kv_head * GROUP + row % GROUP
    is_row = (row < TOKENS * GROUP) & (token < query_len)
    is_dim = dim < HEAD_DIM
    is_number = is_row[:, None] & is_dim[None, :]
    batch_row = (start + token).to(tl.int64)
    at = batch_row[:, None] * token_stride + head[:, None] * head_stride + dim[None, :]
    q = tl.load(query + at, mask=is_number, other=0.0)  # [ROWS, PADDED_DIM]
    q = q.to(tl.float32) if INTERPRETED else q
    last_seen = tl.minimum(context_len - query_len + token, end - 1)  # [ROWS]: the last key that each may look at

    highest = tl.full([ROWS], float("-inf"), tl.float32)  # score so far, times `scale`
    total = tl.zeros([ROWS], tl.float32)  # of the weights, relative to the highest
    result = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    seen_by_all = tl.minimum(end, context_len - query_len + first + 1)  # all queries see what is before
    next_block = blocks_of(block_tables, seq * table_stride, begin, end, BLOCK_SIZE, TILE)
    for tile_begin in range(begin, end, TILE):
        # Blocks are looked up a tile ahead: only then can keys and values be copied a tile ahead.
        block = next_block
        next_block = blocks_of(block_tables, seq * table_stride, tile_begin + TILE, end, BLOCK_SIZE, TILE)
        # Past the end the last key is read again, and never what lies there: that may be another's, or NaN.
        key_position = tile_begin + tl.arange(0, TILE)
        slot = block.to(tl.int64) * BLOCK_SIZE + tl.minimum(key_position, end - 1) % BLOCK_SIZE
        key_at = slot[:, None] * slot_stride + kv_head * HEAD_DIM + dim[None, :]
        k = tl.load(k_cache + key_at, mask=is_dim[None, :], other=0.0)  # [TILE, PADDED_DIM]
        v = tl.load(v_cache + key_at, mask=is_dim[None, :], other=0.0)
        if INTERPRETED:
            k, v = k.to(tl.float32), v.to(tl.float32)

        scores = scores_of(q, k, key_position, last_seen, tile_begin + TILE > seen_by_all)
        new_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
        shrink = tl.exp2(highest - new_highest)
        weight = tl.exp2(scores * scale - new_highest[:, None])
        total = total * shrink + tl.sum(weight, 1)
        result *= shrink[:, None]
        result += tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        highest = new_highest

    result = result / total[:, None]
    num_heads = GROUP * tl.num_programs(0)
    if num_splits == 1:
        at = batch_row[:, None] * (num_heads * HEAD_DIM) + head[:, None] * HEAD_DIM
        at += dim[None, :]
        tl.store(output + at, result.to(output.dtype.element_ty), mask=is_number)
    else:
        piece = (seq.to(tl.int64) * num_heads + head) * max_splits + split  # [ROWS]
        at, is_row = piece[:, None] * HEAD_DIM + dim[None, :], row < GROUP
        tl.store(pieces + at, result, mask=is_row[:, None] & is_dim[None, :])
        tl.store(weights + piece, highest + tl.log2(total), mask=is_row)


@triton.jit(do_not_specialize=["max_splits"])
def combine_kernel(
    pieces, weights, output, context_lens, max_splits,
    PADDED_SPLITS: tl.constexpr, SPLIT_SIZE: tl.constexpr, MAX_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """One program a decode and query head: the weighted mean of what the pieces gave."""
    seq, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_splits, _ = split_of(tl.load(context_lens + seq), SPLIT_SIZE, MAX_SPLITS)
    if num_splits == 1:
        return  # the output is there already
    split, dim = tl.arange(0, PADDED_SPLITS), tl.arange(0, PADDED_DIM)
    is_split, is_dim = split < num_splits, dim < HEAD_DIM
    row = seq * tl.num_programs(1) + head
    at = row * max_splits + split
    weight = tl.load(weights + at, mask=is_split, other=float("-inf"))
    weight = tl.exp2(weight - tl.max(weight, 0))
    at = at[:, None] * HEAD_DIM + dim[None, :]
    piece = tl.load(pieces + at, mask=is_split[:, None] & is_dim[None, :], other=0.0)
    result = tl.sum(piece * weight[:, None], 0) / tl.sum(weight, 0)
    at = row * HEAD_DIM + dim
    tl.store(output + at, result.to(output.dtype.element_ty), mask=is_dim)
