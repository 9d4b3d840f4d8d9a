"""Buckets: the sizes for which there are CUDA graphs. A step replays the graph of the next size up, and pads the rest.

Plain arithmetic, which needs neither torch nor a GPU: the trace and the notebooks ask it, too.
"""

from bisect import bisect_left
from collections.abc import Collection

# Graphs of whole steps. Rounding up costs at most seven rows of padding, which a GPU hardly notices.
BUCKETS = [1, 2, 4, *range(8, 513, 8)]

# Graphs in pieces, with attention between them. For up to 512 tokens few sizes will do: to launch attention takes
# longer than to multiply some rows more. Then eight to a doubling: at most a ninth of the rows are padding. Still
# larger steps keep any GPU busy for longer than Python needs to launch them.
PIECEWISE_BUCKETS = [64, 128, 256, 384, 512] + [
    size * eighths // 8 for size in (512, 1024, 2048, 4096) for eighths in range(9, 17)
]


def takes_pieces(num_tokens: int, chunks: Collection[tuple[int, int]]) -> bool:
    """Whether a step had better replay pieces than one graph.

    `chunks` has, for each sequence with several new tokens, how many they are and how long its context is with them;
    decodes have rows of their own either way. The costs are in units of what it takes to read the keys and values of
    one token in all layers: 14 ns for Qwen3-0.6B on an H100, where 36 kinds of steps were timed both ways, and
    some on a machine with a slow Python (docs/performance.md). For other models and GPUs they are taken to be in the
    same proportion.
    """
    if num_tokens > BUCKETS[-1]:
        return True
    # In one graph each token is a row by itself: it has its own programs, which cost 500, and reads all that it sees.
    whole = sum(n * (context_len - n // 2 + 500) for n, context_len in chunks)
    # Between pieces Python launches attention; there few programs walk through a long context, tile after tile.
    pieces = 140_000 + 35 * max((context_len for _, context_len in chunks), default=0)
    return whole > pieces


def bucket_of(num_tokens: int, in_pieces: bool = False) -> int | None:
    """The smallest bucket that holds so many tokens; None if none is large enough, and the step runs eagerly."""
    buckets = PIECEWISE_BUCKETS if in_pieces or num_tokens > BUCKETS[-1] else BUCKETS
    return buckets[bisect_left(buckets, num_tokens)] if num_tokens <= buckets[-1] else None


def buckets_up_to(most: int) -> list[int]:
    """The buckets of whole steps that an engine with steps of up to `most` tokens needs."""
    return BUCKETS[: bisect_left(BUCKETS, most) + 1]


def piecewise_buckets_up_to(most: int, longest: int) -> list[int]:
    """Those in pieces that it needs, if no context has more than `longest` tokens."""
    buckets = PIECEWISE_BUCKETS[: bisect_left(PIECEWISE_BUCKETS, most) + 1]
    # No step of so many tokens costs more in one graph, beside pieces, than chunks of two at the end of long contexts.
    return [size for size in buckets if takes_pieces(size, [(2, longest)] * (size // 2))]
