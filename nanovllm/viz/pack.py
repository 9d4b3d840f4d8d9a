"""Frames on their way to the browser: what changes from one frame to the next, and all of it compressed.

    pack(frames)            # bytes: a whole run, for a new view
    changes(frames, 3)      # dict: what frame 3 changes in frame 2, for a view that has frame 2

`widget.js` builds the frames anew from these. 500 steps of 64 requests on 512 blocks are half a megabyte.
"""

import json
import zlib
from collections.abc import Iterable
from typing import Any

from nanovllm.engine.trace import BlockState
from nanovllm.viz.frames import Frames, RequestFrame
from nanovllm.viz.theme import COLOURS, ink_on

UNTOUCHED = BlockState((), 0, 0, None, None)
BLOCK = ("block", "owners", "filled", "hash")
REQUEST = ("id", "name", "status", "did", "prompt", "tokens", "computed", "new", "hit", "table", "texts")


def pack(frames: Frames) -> bytes:
    """All frames, as JSON compressed by zlib."""
    data = {
        "num_blocks": frames.trace.num_blocks,
        "block_size": frames.trace.block_size,
        "budget": frames.trace.config["max_num_batched_tokens"],
        "colours": [(colour, ink_on(colour)) for colour in COLOURS],
        "frames": [changes(frames, i) for i in range(len(frames))],
    }
    return zlib.compress(json.dumps(data, separators=(",", ":")).encode(), level=6)


def changes(frames: Frames, index: int) -> dict[str, Any]:
    """What is different in frame `index` from the one before; for frame 0, from an untouched pool without requests.

    Blocks and requests are tables, of the rows that changed, with a list for each column. A block table is given where
    it changed, else None; `texts` are the tokens that a request got. `free` are the ends of the queue of free blocks.
    """
    after, before = frames[index], frames[index - 1] if index else None
    new_blocks = after.blocks
    old_blocks = before.blocks if before else (UNTOUCHED,) * len(new_blocks)
    old_requests = {request.id: request for request in before.requests} if before else {}
    data: dict[str, Any] = {
        "title": after.title,
        "sentence": after.sentence,
        "tokens": after.num_tokens,
        "changed": sorted(after.changed),
        "blocks": table(
            BLOCK,
            (
                (i, new.owners, new.filled, None if new.hash is None else f"{new.hash:016x}")
                for i, (old, new) in enumerate(zip(old_blocks, new_blocks))
                if old[:4] != new[:4]
            ),
        ),
        "requests": table(
            REQUEST,
            (
                row(request, old_requests.get(request.id), frames)
                for request in after.requests
                if request != old_requests.get(request.id)
            ),
        ),
    }
    old_queue, new_queue = queue(old_blocks), queue(new_blocks)
    if old_queue != new_queue:
        data["free"] = ends(old_queue, new_queue)
    return data


def row(request: RequestFrame, before: RequestFrame | None, frames: Frames) -> tuple[Any, ...]:
    traced = frames.trace.requests[request.id]
    token_ids = (traced.prompt_token_ids + traced.output_token_ids)[before.num_tokens if before else 0 :]
    num_new = request.num_tokens - (before.num_tokens if before else 0)
    return (
        request.id,
        request.name,
        request.status,
        request.did,
        request.num_prompt_tokens,
        request.num_tokens,
        request.num_computed_tokens,
        request.num_new_tokens,
        request.num_hit_tokens,
        None if before and before.block_table == request.block_table else request.block_table,
        [frames.trace.text_of(token_id) for token_id in token_ids[:num_new]],
    )


def table(names: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Rows as a column for each name: like stands beside like, which compresses well."""
    return dict(zip(names, zip(*rows))) or {name: () for name in names}


def queue(blocks: tuple[BlockState, ...]) -> list[int]:
    """The free blocks, the next to be taken first."""
    places = sorted((state.free_index, i) for i, state in enumerate(blocks) if state.free_index is not None)
    return [block for _, block in places]


def ends(old: list[int], new: list[int]) -> tuple[list[int], list[int]]:
    """What comes before and after the longest stretch of `new` that stands in the order of `old`."""
    place = {block: i for i, block in enumerate(old)}
    start = end = first = 0
    while first < len(new):
        last = first
        while last < len(new) and new[last] in place and (last == first or place[new[last - 1]] < place[new[last]]):
            last += 1
        if last - first > end - start:
            start, end = first, last
        first = max(last, first + 1)
    return new[:start], new[end:]
