"""Which CUDA graph a step takes."""

import random

import pytest

from nanovllm.engine.buckets import (
    BUCKETS,
    PIECEWISE_BUCKETS,
    bucket_of,
    buckets_up_to,
    piecewise_buckets_up_to,
    takes_pieces,
)


def test_the_buckets_that_an_engine_needs():
    assert buckets_up_to(1) == [1]
    assert buckets_up_to(3) == [1, 2, 4]
    assert buckets_up_to(24) == [1, 2, 4, 8, 16, 24]
    assert buckets_up_to(25)[-1] == 32
    assert buckets_up_to(16_384)[-1] == 512
    assert piecewise_buckets_up_to(64, longest=1000) == []
    assert piecewise_buckets_up_to(64, longest=4000) == [64]
    assert piecewise_buckets_up_to(513, longest=100) == [256, 384, 512, 576]
    assert piecewise_buckets_up_to(700, longest=40_960) == [64, 128, 256, 384, 512, 576, 640, 704]
    assert piecewise_buckets_up_to(16_384, longest=40_960) == PIECEWISE_BUCKETS


def test_the_bucket_of_a_step():
    for num_tokens in range(1, 8193):
        for in_pieces in (False, True):
            buckets = PIECEWISE_BUCKETS if in_pieces or num_tokens > 512 else BUCKETS
            assert bucket_of(num_tokens, in_pieces) == min(size for size in buckets if size >= num_tokens)
    assert bucket_of(8193) is None and bucket_of(16_384) is None
    assert max(bucket_of(n) - n for n in range(1, 513)) == 7
    assert max((bucket_of(n) - n) / bucket_of(n) for n in range(513, 8193)) < 1 / 9


# Milliseconds in one graph and in pieces: new tokens of each sequence, the context that they have in the cache.
# Qwen3-0.6B on an H100, 2026-11-27.
MEASURED = [
    (1, 64, 0, 2.23, 2.70), (1, 128, 0, 2.48, 2.81), (1, 192, 0, 2.98, 2.75),
    (1, 256, 0, 3.48, 2.76), (1, 384, 0, 4.57, 3.11), (1, 512, 0, 5.96, 3.31),
    (4, 64, 0, 3.33, 3.00), (4, 128, 0, 4.77, 3.20), (8, 64, 0, 4.70, 3.31),
    (16, 32, 0, 4.74, 3.60), (2, 256, 0, 5.17, 3.14), (32, 16, 0, 5.07, 4.12),
    (1, 16, 1024, 2.90, 4.13), (1, 32, 1024, 3.06, 4.06), (1, 64, 1024, 3.61, 4.10),
    (1, 128, 1024, 4.96, 4.13), (1, 256, 1024, 7.82, 3.99), (1, 500, 1024, 13.79, 4.41),
    (1, 16, 4096, 4.86, 6.25), (1, 32, 4096, 5.65, 6.17), (1, 64, 4096, 7.76, 6.17),
    (1, 128, 4096, 11.74, 6.23), (1, 256, 4096, 20.43, 6.48), (1, 500, 4096, 36.93, 6.98),
    (1, 16, 16384, 15.33, 16.60), (1, 32, 16384, 14.75, 19.57), (1, 64, 16384, 22.84, 16.66),
    (1, 128, 16384, 36.88, 16.40), (1, 256, 16384, 66.95, 16.75), (1, 500, 16384, 125.77, 17.37),
    (1, 16, 32768, 21.12, 31.25), (1, 32, 32768, 28.09, 31.26), (1, 64, 32768, 42.89, 31.40),
    (1, 128, 32768, 71.55, 31.36), (1, 256, 32768, 130.87, 31.72), (1, 500, 32768, 245.38, 33.28),
]  # fmt: skip


# The same where Python is slow and uneven, on another machine with an H100 (2026-11-28).
MEASURED_WITH_A_SLOW_PYTHON = [
    (1, 64, 0, 2.50, 4.03), (1, 128, 0, 2.88, 4.61), (1, 192, 0, 3.42, 4.98), (1, 256, 0, 3.85, 4.42),
    (1, 384, 0, 5.03, 4.18), (1, 512, 0, 6.51, 4.93), (4, 64, 0, 3.79, 4.82), (4, 128, 0, 5.36, 4.35),
    (8, 64, 0, 5.23, 5.17), (16, 32, 0, 5.67, 5.83), (2, 256, 0, 5.69, 4.68), (32, 16, 0, 6.05, 4.83),
]  # fmt: skip


@pytest.mark.parametrize("num_seqs, num_new, cached, whole, in_pieces", MEASURED + MEASURED_WITH_A_SLOW_PYTHON)
def test_a_step_goes_the_way_that_was_faster_or_hardly_slower(num_seqs, num_new, cached, whole, in_pieces):
    chunks = [(num_new, cached + num_new)] * num_seqs
    chosen = in_pieces if takes_pieces(num_seqs * num_new, chunks) else whole
    assert chosen < 1.2 * min(whole, in_pieces)


def test_decodes_and_short_chunks_take_one_graph_until_there_are_too_many():
    assert not takes_pieces(512, [])
    assert not takes_pieces(500, [(5, 300)])
    assert takes_pieces(513, [])


@pytest.mark.parametrize("seed", range(20))
def test_an_engine_has_a_graph_for_each_of_its_steps(seed):
    """Whatever its budget, its longest context, and how the tokens of a step are spread over sequences."""
    rng = random.Random(seed)
    for _ in range(300):
        most = rng.choice([1, 9, 64, 100, 200, 512, 600, 1500, 20_000])
        longest = rng.choice([60, 500, 2000, 40_960, rng.randint(60, 3000)])
        chunks, left = [], rng.randint(1, most)
        largest = rng.choice([2, 3, 40, longest])
        while left > 0:
            n = min(left, rng.choice([largest, rng.randint(1, largest)]))
            chunks.append((n, rng.choice([n, longest, rng.randint(n, longest)])))
            left -= n
        assert_there_is_a_graph(chunks, most, longest)


def test_an_engine_has_a_graph_for_many_short_chunks_at_the_end_of_long_contexts():
    """They cost the most in one graph: the pieces of a size may be needed for these alone."""
    for longest in [*range(60, 400, 4), *range(1000, 2500, 8)]:
        for size in (64, 128, 256, 384, 512):
            for n in (2, 3, 8, 32, 60):
                assert_there_is_a_graph([(n, longest)] * (size // n), size, longest)


def assert_there_is_a_graph(chunks: list[tuple[int, int]], most: int, longest: int) -> None:
    num_tokens = sum(n for n, _ in chunks)
    in_pieces = takes_pieces(num_tokens, [chunk for chunk in chunks if chunk[0] > 1])
    buckets = piecewise_buckets_up_to(most, longest) if in_pieces else buckets_up_to(most)
    assert bucket_of(num_tokens, in_pieces) in [*buckets, None]
