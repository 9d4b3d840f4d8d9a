"""Which CUDA graph a step of so many tokens takes."""

from nanovllm.engine.buckets import BUCKETS, LARGE_BUCKETS, bucket_of, buckets_up_to, large_buckets_up_to


def test_the_buckets_that_an_engine_needs():
    assert buckets_up_to(1) == [1]
    assert buckets_up_to(3) == [1, 2, 4]
    assert buckets_up_to(24) == [1, 2, 4, 8, 16, 24]
    assert buckets_up_to(25)[-1] == 32
    assert buckets_up_to(16_384)[-1] == 512
    assert large_buckets_up_to(512) == []
    assert large_buckets_up_to(513) == [576]
    assert large_buckets_up_to(700) == [576, 640, 704]
    assert large_buckets_up_to(16_384)[-1] == 8192


def test_the_bucket_of_a_step():
    for num_tokens in range(1, 8193):
        bucket = bucket_of(num_tokens)
        assert bucket in BUCKETS + LARGE_BUCKETS and bucket >= num_tokens
        assert all(smaller < num_tokens for smaller in BUCKETS + LARGE_BUCKETS if smaller < bucket)
    assert bucket_of(8193) is None and bucket_of(16_384) is None
    assert max(bucket_of(n) - n for n in range(1, 513)) == 7
    assert max((bucket_of(n) - n) / bucket_of(n) for n in range(513, 8193)) < 1 / 9


def test_an_engine_has_a_graph_for_each_of_its_steps():
    for most in (1, 2, 3, 7, 8, 9, 100, 512, 513, 576, 577, 1024, 1500, 20_000):
        needed = {bucket_of(n) for n in range(1, most + 1)} - {None}
        assert needed == set(buckets_up_to(most) + large_buckets_up_to(most))
