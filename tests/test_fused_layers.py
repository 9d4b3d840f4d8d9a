"""The small Triton kernels, of layers and of the sampler, against plain computations of the same thing.

On a GPU if there is one, and in Triton's interpreter on a CPU: for that this file runs itself once more.
"""

import numpy as np
import pytest
import torch

from nanovllm.bench.kernels import small_operations
from nanovllm.kernels import fused_layers
from nanovllm.kernels.check import check_small_kernels
from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import norm_and_rotate, rotate
from tests import interpreter
from tests.conftest import TOLERANCE

triton_layers = pytest.importorskip("nanovllm.kernels.triton_layers")
from nanovllm.kernels import triton_sampler
from nanovllm.layers.sampler import SamplingBatch, random_bits
from nanovllm.layers.sampler import sample as plain_sample
from nanovllm.layers.sampler import uniform_numbers

DEVICE = "cpu" if interpreter.IS_ON or not torch.cuda.is_available() else "cuda"
in_the_interpreter = pytest.mark.skipif(not interpreter.IS_ON, reason="needs the interpreter, or a GPU")
somewhere = pytest.mark.gpu if DEVICE == "cuda" else in_the_interpreter
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)
pytestmark = pytest.mark.usefixtures("seeded")


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to what the plain layer gives on a CPU, but for a few roundings."""
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=tolerance)


@somewhere
@every_dtype
@pytest.mark.parametrize("shape", [(1, 64), (5, 576), (3, 17), (4, 9, 80), (2, 1, 256)])
def test_rms_norm(shape, dtype):
    plain = RMSNorm(shape[-1], 1e-5).to(dtype)
    plain.weight.normal_()
    x = torch.randn(shape, dtype=dtype)
    check(triton_layers.rms_norm(x.to(DEVICE), plain.weight.to(DEVICE), 1e-5), plain(x))


@somewhere
@every_dtype
@pytest.mark.parametrize("shape", [(5, 576), (1, 1024), (4, 17)])
def test_sum_and_rms_norm(shape, dtype):
    """The sum stays in the residual stream, rounded, and it is the rounded sum that is normalised."""
    plain = RMSNorm(shape[-1], 1e-5).to(dtype)
    plain.weight.normal_()
    x, delta = torch.randn(shape, dtype=dtype), 4 * torch.randn(shape, dtype=dtype)
    stream = x.clone().to(DEVICE)
    normed = triton_layers.rms_norm(stream, plain.weight.to(DEVICE), 1e-5, delta.to(DEVICE))
    check(normed, plain(x, delta))
    check(stream, x)  # the sum, on both sides


@somewhere
@every_dtype
@pytest.mark.parametrize("num_queries, num_keys, head_dim", [(4, 2, 32), (16, 8, 128), (9, 3, 64), (5, 1, 80)])
def test_norm_and_rotate_of_heads_that_lie_inside_a_wider_row(num_queries, num_keys, head_dim, dtype):
    """Queries and keys are views of what one product gave; the kernel must walk over the values that are between."""
    num_heads = num_queries + num_keys
    wide = torch.randn(6, num_heads + num_keys, head_dim, dtype=dtype)
    q_norm, k_norm = RMSNorm(head_dim, 1e-5).to(dtype), RMSNorm(head_dim, 1e-5).to(dtype)
    q_norm.weight.normal_(), k_norm.weight.normal_()
    cos, sin = angles(6, head_dim, dtype)
    expected = norm_and_rotate(wide[:, :num_heads], q_norm, k_norm, num_queries, cos, sin)
    weights = (q_norm.weight.to(DEVICE), k_norm.weight.to(DEVICE))
    qk = wide.to(DEVICE)[:, :num_heads]
    check(triton_layers.rotate(qk, cos.to(DEVICE), sin.to(DEVICE), num_queries, *weights, 1e-5), expected)


@somewhere
def test_rotation_of_heads_that_lie_inside_a_wider_row():
    wide = torch.randn(6, 8, 32)
    cos, sin = angles(6, 32, torch.float32)
    expected = rotate(wide[:, 2:7], cos, sin)
    check(triton_layers.rotate(wide.to(DEVICE)[:, 2:7], cos.to(DEVICE), sin.to(DEVICE)), expected)


@somewhere
@every_dtype
@pytest.mark.parametrize("num_heads, head_dim", [(9, 64), (1, 80), (24, 128), (3, 2)])
def test_rotate(num_heads, head_dim, dtype):
    x = torch.randn(5, num_heads, head_dim, dtype=dtype)
    cos, sin = angles(5, head_dim, dtype)
    check(triton_layers.rotate(x.to(DEVICE), cos.to(DEVICE), sin.to(DEVICE)), rotate(x, cos, sin))


def angles(num_tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.randn(num_tokens, 1, head_dim // 2)
    cos, sin = half.cos().to(dtype), half.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


@somewhere
@every_dtype
@pytest.mark.parametrize("size", [1, 1024, 1536, 3000])
def test_silu_and_mul(size, dtype):
    gate_up = 3 * torch.randn(3, 2 * size, dtype=dtype)
    check(triton_layers.silu_and_mul(gate_up.to(DEVICE)), silu_and_mul(gate_up))


@somewhere
@every_dtype
def test_the_benchmark_sets_the_same_operations_beside_ours(dtype):
    sizes = dict(hidden_size=80, intermediate_size=96, head_dim=32, num_attention_heads=4, num_key_value_heads=2)
    for operation in small_operations(sizes | {"rms_norm_eps": 1e-6}, dtype, DEVICE).values():
        inputs = operation.inputs(5)
        copies = [tensor.clone() for tensor in inputs]
        check(operation.ours(*inputs), operation.plain(*copies).cpu())
        for tensor, copy in zip(inputs, copies):
            check(tensor, copy.cpu())  # the sum, which both leave in the residual stream


@somewhere
@every_dtype
def test_the_kernels_pass_their_check(dtype):
    check_small_kernels(triton_layers, triton_sampler, dtype, DEVICE)


@somewhere
@pytest.mark.parametrize(
    "kernel, is_wrong, name",
    [
        ("rms_norm", lambda *args: len(args) == 3, "rms_norm"),
        ("rms_norm", lambda *args: len(args) == 4, "rms_norm of a sum"),
        ("rotate", lambda *args: len(args) == 3, "rotate"),
        ("rotate", lambda *args: len(args) > 3, "rotate with norms"),
        ("silu_and_mul", lambda *args: True, "silu_and_mul"),
    ],
)
def test_a_kernel_that_is_a_little_wrong_does_not_pass(monkeypatch, kernel, is_wrong, name):
    """With what is optional or without, by 5 %."""
    right = getattr(triton_layers, kernel)
    monkeypatch.setattr(triton_layers, kernel, lambda *args: right(*args) * (1.05 if is_wrong(*args) else 1))
    with pytest.raises(RuntimeError, match=f"^{name} differs from the plain layer by 5.0%"):
        check_small_kernels(triton_layers, triton_sampler, torch.float32, DEVICE)


@somewhere
def test_a_kernel_that_leaves_no_sum_does_not_pass(monkeypatch):
    right = triton_layers.rms_norm
    monkeypatch.setattr(triton_layers, "rms_norm", lambda x, *args: right(x.clone(), *args))
    with pytest.raises(RuntimeError, match="^the sum differs"):
        check_small_kernels(triton_layers, triton_sampler, torch.float32, DEVICE)


@somewhere
@pytest.mark.parametrize("is_random", [False, True])
def test_a_sampler_that_is_wrong_does_not_pass(monkeypatch, is_random):
    """Greedy rows alone, or random ones alone."""
    right = triton_sampler.sample

    def sample(logits, temperature, bits):
        return right(logits, temperature, bits) + ((temperature > 0) == is_random)

    monkeypatch.setattr(triton_sampler, "sample", sample)
    with pytest.raises(RuntimeError, match="^the sampler has drawn"):
        check_small_kernels(triton_layers, triton_sampler, torch.float32, DEVICE)


def test_kernels_that_are_wrong_or_do_not_run_are_done_without(monkeypatch, caplog):
    """Whatever Triton raises: the plain layers do the same, and a warning says so."""

    def fail(layers, sampler, dtype, device):
        if dtype == torch.float16:
            raise ValueError("no such instruction")

    monkeypatch.setattr("nanovllm.kernels.check.check_small_kernels", fail)
    assert fused_layers.__wrapped__(torch.float32) is triton_layers and not caplog.messages
    assert fused_layers.__wrapped__(torch.float16) is None
    assert "take PyTorch's kernels: no such instruction" in caplog.text


@pytest.mark.skipif(interpreter.IS_ON, reason="the interpreter does not compile")
@pytest.mark.parametrize(
    "capability, dtype", [(70, "*fp16"), (75, "*fp16"), (80, "*bf16"), (89, "*bf16"), (90, "*bf16"), (90, "*fp32")]
)
def test_kernels_compile_for_gpus_that_are_not_here(capability, dtype):
    """With what is optional and without: the sizes are those of Qwen3-0.6B."""
    norm = dict(SIZE=1024, PADDED=1024)
    rotation = dict(NUM_HEADS=24, NUM_QUERIES=16, PADDED_HEADS=32, HALF=64, PADDED_HALF=64)
    for kernel, constants in (
        (triton_layers.rms_norm_kernel, norm),
        (triton_layers.rms_norm_kernel, norm | {"delta": None}),
        (triton_layers.rotate_kernel, rotation),
        (triton_layers.rotate_kernel, rotation | {"q_weight": None, "k_weight": None}),
        (triton_layers.silu_and_mul_kernel, dict(SIZE=3072)),
        (triton_sampler.weigh_kernel, dict(PIECE=4096)),
        (triton_sampler.choose_kernel, dict(PIECE=4096, PADDED=64)),  # 38 pieces
        (triton_sampler.choose_kernel, dict(PIECE=4096, PADDED=1)),
    ):
        types = dict.fromkeys(kernel.arg_names, dtype) | dict.fromkeys(("temperature", "best", "weights"), "*fp32")
        types |= dict.fromkeys(("token_stride", "row_stride", "vocab_size", "num_pieces"), "i32") | {"eps": "fp32"}
        types |= dict.fromkeys(("bits", "token_ids"), "*i64")
        assert interpreter.shared_memory_of(kernel, types, constants, capability) <= 4096, "a few sums"


# -- The sampler -------------------------------------------------------------------------------------------------------


NUM_DRAWS = 300 if DEVICE == "cpu" else 20_000  # the interpreter takes some 10 ms for each


def sample(logits: torch.Tensor, temperature: list[float], seeds: list[int] | range) -> list[int]:
    bits = torch.from_numpy(random_bits(list(seeds), [7] * len(seeds)).view(np.int64))
    tensors = (logits, torch.tensor(temperature, dtype=torch.float32), bits)
    return triton_sampler.sample(*(t.to(DEVICE) for t in tensors)).tolist()


@somewhere
@every_dtype
def test_greedy_takes_the_best_and_the_first_of_equals(dtype):
    logits = torch.randn(4, 9000).to(dtype)
    logits[1, [5000, 8999]] = 100
    logits[2, [17, 18]] = 100
    assert sample(logits, [0.0] * 4, range(4)) == [int(row.argmax()) for row in logits.float()]


@somewhere
@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_tokens_come_with_their_probabilities(temperature):
    """Chi-square over tokens in both of two pieces; 4.5 standard deviations above its mean is one run in 300,000."""
    num_draws, tokens = NUM_DRAWS, [0, 17, 4095, 4096, 4999]
    logits = torch.full((5000,), -1000.0)
    logits[tokens] = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0])
    drawn = sample(logits.expand(num_draws, -1), [temperature] * num_draws, range(1000, 1000 + num_draws))
    expected = num_draws * (logits / temperature).softmax(-1)[tokens]
    counts = torch.tensor([float(drawn.count(token)) for token in tokens])
    assert counts.sum() == num_draws
    assert ((counts - expected) ** 2 / expected).sum() < 4 + 4.5 * 8**0.5


@somewhere
def test_a_flat_distribution_is_drawn_flat():
    """Of 8,192 equal tokens each eighth is hit as often: the random numbers are good for rare tokens, too."""
    num_draws = NUM_DRAWS
    drawn = torch.tensor(sample(torch.zeros(1, 8192).expand(num_draws, -1), [1.0] * num_draws, range(num_draws)))
    counts = torch.bincount(drawn // 1024, minlength=8).float()
    assert ((counts - num_draws / 8) ** 2 / (num_draws / 8)).sum() < 7 + 4.5 * 14**0.5
    num_different = 8192 * (1 - (1 - 1 / 8192) ** num_draws)  # expected
    assert abs(len(drawn.unique()) - num_different) < 5 * num_different**0.5


@somewhere
def test_the_same_seed_draws_the_same_token_alone_and_in_a_crowd():
    logits = torch.randn(6, 6000)
    crowd = sample(logits, [1.0, 0.0, 2.0, 1.0, 0.7, 1.0], [5, 0, 7, 2**62, 9, 5])
    assert [sample(logits[i : i + 1], [t], [k])[0] for i, t, k in ((0, 1.0, 5), (3, 1.0, 2**62), (4, 0.7, 9))] == [
        crowd[i] for i in (0, 3, 4)
    ]
    assert len({sample(logits[:1], [2.0], [seed])[0] for seed in range(20)}) > 10


@somewhere
@pytest.mark.parametrize("vocab_size", [5, 4096, 4097, 10_000])
def test_it_throws_the_same_dart_as_the_plain_sampler(vocab_size):
    """Whole numbers there, floats here: now and then the dart falls between what the two call a token's edge."""
    num_draws = NUM_DRAWS // 4
    logits = 3 * torch.randn(num_draws, vocab_size)
    logits[0, -1] = 50
    temperature = torch.rand(num_draws).clamp(min=0.05).tolist()
    uniform = uniform_numbers(range(num_draws), [7] * num_draws)
    nothing = [0] * num_draws, [1.0] * num_draws, [0.0] * num_draws
    expected = plain_sample(logits, SamplingBatch.from_host(temperature, *nothing, uniform)).tolist()
    drawn = sample(logits, temperature, range(num_draws))
    assert drawn[0] == vocab_size - 1
    assert sum(a == b for a, b in zip(drawn, expected)) > 0.98 * num_draws


@somewhere
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_nothing_can_be_sampled_from(temperature):
    logits = torch.randn(5, 9000)
    logits[0, 8999], logits[1, 3], logits[2], logits[3, :8000] = torch.nan, torch.inf, -torch.inf, -torch.inf
    tokens = sample(logits, [temperature] * 5, range(5))
    assert tokens[:3] == [-1, -1, -1] and tokens[3] >= 8000 and tokens[4] >= 0


@somewhere
def test_a_tiny_temperature_is_greedy():
    logits = 100 * torch.randn(3, 5000)
    assert sample(logits, [1e-6, 1e-38, 1e-4], range(3)) == logits.argmax(dim=-1).tolist()


@pytest.mark.skipif(interpreter.IS_ON, reason="this is the process of its own")
def test_in_the_interpreter():
    """All of the above on a CPU."""
    interpreter.run_tests_of(__file__)
