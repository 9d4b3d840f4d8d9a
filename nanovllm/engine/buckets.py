"""Buckets: the sizes for which there are CUDA graphs. A step replays the graph of the next size up, and pads the rest.

Plain arithmetic, which needs neither torch nor a GPU: the trace and the notebooks ask it, too.
"""

from bisect import bisect_left

# Rounding up costs at most seven rows of padding, which a GPU hardly notices. Larger steps are those with long prompts,
# and come in too many sizes for a graph each.
BUCKETS = [1, 2, 4, *range(8, 513, 8)]


def bucket_of(num_tokens: int) -> int | None:
    """The smallest bucket that holds so many tokens; None if none is large enough, and the step runs eagerly."""
    return BUCKETS[bisect_left(BUCKETS, num_tokens)] if num_tokens <= BUCKETS[-1] else None


def buckets_up_to(most: int) -> list[int]:
    """The buckets that steps of up to `most` tokens need; larger steps have none."""
    return BUCKETS[: bisect_left(BUCKETS, most) + 1]
