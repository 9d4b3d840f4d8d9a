"""The sizes for which there are CUDA graphs."""

from nanovllm.engine.buckets import BUCKETS, bucket_of, buckets_up_to


def test_the_buckets_that_an_engine_needs():
    assert buckets_up_to(1) == [1]
    assert buckets_up_to(3) == [1, 2, 4]
    assert buckets_up_to(24) == [1, 2, 4, 8, 16, 24]
    assert buckets_up_to(25)[-1] == 32
    assert buckets_up_to(16_384)[-1] == 512


def test_the_bucket_of_a_step():
    for num_tokens in range(1, 513):
        bucket = bucket_of(num_tokens)
        assert bucket in BUCKETS and bucket >= num_tokens
        assert all(other < num_tokens for other in BUCKETS if other < bucket)
    assert bucket_of(513) is None and bucket_of(16_384) is None
    assert max(bucket_of(n) - n for n in range(1, 513)) == 7


def test_an_engine_has_a_graph_for_each_of_its_steps():
    for most in (1, 3, 24, 25, 511, 512, 4096):
        needed = {bucket_of(n) for n in range(1, most + 1)} - {None}
        assert needed == set(buckets_up_to(most))
