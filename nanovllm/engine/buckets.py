"""Buckets: the sizes for which there are CUDA graphs. A step replays the graph of the next size up, and pads the rest.

Plain arithmetic, which needs neither torch nor a GPU: the trace and the notebooks ask it, too.
"""

from bisect import bisect_left

# Graphs of whole steps. Rounding up costs at most seven rows of padding, which a GPU hardly notices.
BUCKETS = [1, 2, 4, *range(8, 513, 8)]

# Graphs in pieces, with attention between them. Eight sizes to a doubling: at most a ninth of the rows are padding. Still
# larger steps keep any GPU busy for longer than Python needs to launch them.
LARGE_BUCKETS = [size * eighths // 8 for size in (512, 1024, 2048, 4096) for eighths in range(9, 17)]

ALL_BUCKETS = BUCKETS + LARGE_BUCKETS


def bucket_of(num_tokens: int) -> int | None:
    """The smallest bucket that holds so many tokens; None if none is large enough, and the step runs eagerly."""
    return ALL_BUCKETS[bisect_left(ALL_BUCKETS, num_tokens)] if num_tokens <= ALL_BUCKETS[-1] else None


def buckets_up_to(most: int) -> list[int]:
    """The buckets that steps of up to `most` tokens need, in one graph each."""
    return BUCKETS[: bisect_left(BUCKETS, most) + 1]


def large_buckets_up_to(most: int) -> list[int]:
    """The large ones that they need, none if `most` tokens find a graph of a whole step."""
    return LARGE_BUCKETS[: bisect_left(LARGE_BUCKETS, most) + 1] if most > BUCKETS[-1] else []
