"""Paged attention in plain PyTorch: the reference, on any device.

Keys and values lie in blocks that are scattered over the cache (Kwon et al. 2023, "Efficient Memory Management for
Large Language Model Serving with PagedAttention"). Plain PyTorch cannot attend to scattered memory, so every layer
first gathers what a sequence looks back on, then calls ordinary attention. *Where* that lies is the same in all layers:
it is worked out once a step, in `plan`.

Grouped-query attention shares a KV head between several query heads. Those only read it, so nothing is copied for them:
a decode puts the query heads of a group where ordinary attention has several queries, and a prefill expands the KV head
with a stride of zero.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanovllm.utils.context import Context

# Decodes are computed together, padded to the longest. From about this many slots of padding on it is faster to start
# another group: on two CPU cores a group takes some 60 us a layer, a slot 0.15.
MAX_PADDING = 512

# So many bytes a group, or one sequence, is all that is gathered at a time. On a CPU it is read again before it has
# left the cache: with 8 KV heads of 128 in float32, 16 contexts of 1,024 tokens take 12.6 ms a layer, in one group 18.
MAX_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}

# A prompt's tokens attend in pieces of so many, each to what it may see and no further: PyTorch's CPU kernel does not
# leave out by itself what a causal mask hides. Attention of 512 tokens on a CPU: 3.6 ms in one piece, 2.9 in pieces of
# 256, 2.5 of 64, 2.7 of 32. On a GPU it is the launches that are dear.
MAX_QUERIES = {"cpu": 64, "cuda": 256}


@dataclass(slots=True)
class DecodeGroup:
    """Sequences with one new token each and contexts of similar length; n of them, the longest context is L.

    A slot holds a row of `head_dim` numbers for each KV head. `cache_rows` counts such rows, not slots.
    """

    rows: slice | torch.Tensor  # [n]: where they stand in the batch
    cache_rows: torch.Tensor  # [n * num_kv_heads * L]: where their K/V lie in the cache
    mask: torch.Tensor  # [n, 1, 1, L]: 0 where there is a token, -inf where there is padding
    key: torch.Tensor  # [n, num_kv_heads, L, head_dim]: room for what is gathered
    value: torch.Tensor  # the same


@dataclass(slots=True)
class Piece:
    """Some of a sequence's new tokens, n of them, the last of which sees the first V tokens of its context."""

    rows: slice  # among the new tokens
    num_visible: int  # V
    mask: torch.Tensor | None  # [n, V]: what each may see; None if there is nothing before the first


@dataclass(slots=True)
class Prefill:
    """A sequence with several new tokens, which attend in pieces."""

    rows: slice  # the new tokens in the batch
    slots: torch.Tensor  # [context_len]: where K/V lie in the cache
    pieces: list[Piece]


@dataclass(slots=True)
class Plan:
    decodes: list[DecodeGroup]
    prefills: list[Prefill]


def allocate(
    num_layers: int,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor:
    """A KV cache of `[2, num_layers, num_blocks + 1, block_size, num_kv_heads, head_dim]`; [0] holds keys, [1] values.

    The block more than `num_blocks` is a dummy: padding may write there.
    """
    return torch.zeros(2, num_layers, num_blocks + 1, block_size, num_kv_heads, head_dim, dtype=dtype, device=device)


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write the new tokens' keys and values, `[num_tokens, num_kv_heads, head_dim]` each, to their slots."""
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, key)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, value)


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
    num_kv_heads, head_dim]`, and hold the new tokens already. Reads nothing but the slots of the sequences themselves:
    what else lies in the cache, NaN included, does no harm.
    """
    decodes, prefills = context.plan.decodes, context.plan.prefills
    if output is None:
        if len(decodes) == 1 and not prefills:  # the usual step: nothing to put together
            return attend_decodes(query, k_cache, v_cache, decodes[0], scale)
        output = torch.empty_like(query)
    for group in decodes:
        output[group.rows] = attend_decodes(query[group.rows], k_cache, v_cache, group, scale)
    for prefill in prefills:
        attend_prefill(query[prefill.rows], k_cache, v_cache, prefill, scale, output[prefill.rows])
    return output


def attend_decodes(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, group: DecodeGroup, scale: float
) -> torch.Tensor:
    """One query a sequence, `[n, num_heads, head_dim]`, for all sequences of a group at once."""
    n, num_heads, head_dim = query.shape
    # The rows come out in the order that attention wants, all tokens of a KV head together: no transposing.
    torch.index_select(k_cache.view(-1, head_dim), 0, group.cache_rows, out=group.key.view(-1, head_dim))
    torch.index_select(v_cache.view(-1, head_dim), 0, group.cache_rows, out=group.value.view(-1, head_dim))
    query = query.view(n, k_cache.size(2), -1, head_dim)  # [n, num_kv_heads, heads that share one, head_dim]
    # The formula itself is faster in float32 on a CPU: steps of 16 to 48 decodes take 5 to 9 % less than with PyTorch's
    # function. But between two products of 16-bit numbers it rounds the scores, and the function does not.
    if query.dtype == torch.float32:
        scores = (query * scale) @ group.key.transpose(2, 3) + group.mask  # [n, num_kv_heads, heads that share one, L]
        output = scores.softmax(dim=-1) @ group.value
    else:
        output = F.scaled_dot_product_attention(query, group.key, group.value, group.mask, scale=scale)
    return output.reshape(n, num_heads, head_dim)


def attend_prefill(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    prefill: Prefill,
    scale: float,
    output: torch.Tensor,
) -> None:
    """The new tokens of one sequence: `query` and `output` are `[query_len, num_heads, head_dim]`."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    query = query.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # [num_kv_heads, group, query_len, head_dim]
    shape = (num_kv_heads, query.size(1), len(prefill.slots), head_dim)
    key = k_cache.flatten(0, 1).index_select(0, prefill.slots)  # [context_len, num_kv_heads, head_dim]
    value = v_cache.flatten(0, 1).index_select(0, prefill.slots)
    key = key.transpose(0, 1).unsqueeze(1).expand(shape)  # [num_kv_heads, group, context_len, head_dim]
    value = value.transpose(0, 1).unsqueeze(1).expand(shape)
    for piece in prefill.pieces:
        q, k, v = query[:, :, piece.rows], key[:, :, : piece.num_visible], value[:, :, : piece.num_visible]
        attended = F.scaled_dot_product_attention(q, k, v, piece.mask, is_causal=piece.mask is None, scale=scale)
        output[piece.rows] = attended.permute(2, 0, 1, 3).flatten(1, 2)


def plan(context: Context, k_cache: torch.Tensor) -> Plan:
    """What `attend` needs to know of a step; `k_cache` is any layer's, for its shape, dtype and device."""
    context_lens = context.context_lens.tolist()
    starts = context.query_start.tolist()
    n = context.num_decodes
    max_slots = MAX_BYTES[k_cache.device.type] // (2 * k_cache[0, 0].nbytes)
    groups = group_by_length(context_lens[:n], max_slots)
    # Memory for all groups and layers: to ask the system for a large piece in every layer takes longer than to fill it.
    num_slots = max((len(seqs) * context_lens[seqs[0]] for seqs in groups), default=0)
    room = k_cache.new_empty(2, num_slots, *k_cache.shape[2:])
    return Plan(
        decodes=[plan_decodes(context, k_cache, seqs, room) for seqs in groups],
        prefills=[
            plan_prefill(context, k_cache, i, slice(starts[i], starts[i + 1]), context_lens[i])
            for i in range(n, len(context_lens))
        ],
    )


def group_by_length(context_lens: list[int], max_slots: int) -> list[list[int]]:
    """Decodes that are computed together: a long context must not make the gather of thirty short ones long as well."""
    groups: list[list[int]] = []
    padding, longest = 0, 0
    for i in sorted(range(len(context_lens)), key=lambda i: -context_lens[i]):
        padding += longest - context_lens[i]
        if not groups or padding > MAX_PADDING or (len(groups[-1]) + 1) * longest > max_slots:
            groups.append([])
            padding, longest = 0, context_lens[i]
        groups[-1].append(i)
    return groups


def plan_decodes(context: Context, k_cache: torch.Tensor, seqs: list[int], room: torch.Tensor) -> DecodeGroup:
    device, num_kv_heads = k_cache.device, k_cache.size(2)
    # Indexing with a slice is a view, with a tensor a copy; most steps have a single group.
    rows = slice(0, len(seqs)) if len(seqs) == context.num_decodes else torch.tensor(seqs, device=device)
    context_lens = context.context_lens[rows].unsqueeze(1)  # [n, 1]
    longest = int(context_lens.max())
    is_token = torch.arange(longest, device=device) < context_lens  # [n, L]
    slots = slots_of(context.block_tables[rows], longest, context.block_size)  # [n, L]
    # Padding reads the sequence's own first token. Its weight will be 0, but 0 * NaN is NaN: it must not read others'.
    slots = torch.where(is_token, slots, slots[:, :1])
    heads = torch.arange(num_kv_heads, device=device).unsqueeze(1)  # [num_kv_heads, 1]
    mask = torch.zeros(is_token.shape, dtype=k_cache.dtype, device=device).masked_fill_(~is_token, float("-inf"))
    # In the middle of the room, whatever the group's size: of two threads that share the work each fills and reads the
    # side it had before. When every group began at the room's first slot, a run took up to a fifth longer.
    size = len(seqs) * longest
    start = (room.size(1) - size) // 2
    key, value = room[:, start : start + size].view(2, len(seqs), num_kv_heads, longest, -1)
    return DecodeGroup(rows, (slots.unsqueeze(1) * num_kv_heads + heads).flatten(), mask[:, None, None], key, value)


def plan_prefill(context: Context, k_cache: torch.Tensor, seq: int, rows: slice, context_len: int) -> Prefill:
    """A sequence whose new tokens stand in some rows of the batch."""
    slots = slots_of(context.block_tables[seq : seq + 1], context_len, context.block_size).squeeze(0)
    num_new, max_queries = rows.stop - rows.start, MAX_QUERIES[k_cache.device.type]
    pieces = []
    for first in range(0, num_new, max_queries):
        last = min(first + max_queries, num_new)
        n, num_visible = last - first, context_len - (num_new - last)
        mask = None
        if n < num_visible:
            # New token i of the piece stands at position num_visible - n + i: it sees that far and no further.
            mask = k_cache.new_full((n, num_visible), float("-inf")).triu_(num_visible - n + 1)
        pieces.append(Piece(slice(first, last), num_visible, mask))
    return Prefill(rows, slots, pieces)


def slots_of(block_tables: torch.Tensor, num_tokens: int, block_size: int) -> torch.Tensor:
    """The slots of the first tokens of each sequence, `[n, num_tokens]`; `block_tables` is `[n, max_blocks]`."""
    blocks = block_tables[:, : -(-num_tokens // block_size)].long().unsqueeze(2)  # [n, blocks, 1]
    offsets = torch.arange(block_size, device=blocks.device)
    return (blocks * block_size + offsets).flatten(1)[:, :num_tokens]
