"""Each layer against a plain computation of the same thing, in float64 where that says something."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.embed_head import Embedding, LMHead
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import ColumnParallelLinear, Linear, linear_in_float32, pack
from nanovllm.layers.rotary_embedding import RotaryEmbedding, rope_inverse_frequencies, rope_settings, rotate
from nanovllm.utils.ranks import Ranks
from tests.conftest import TOLERANCE

pytestmark = pytest.mark.usefixtures("seeded")


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# ---- RMSNorm and SiLU ----


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 64), (7, 96), (5, 3, 32)])
def test_rms_norm(dtype, shape):
    x = torch.randn(shape, dtype=dtype)
    norm = RMSNorm(shape[-1], eps=1e-6)
    norm.weight.copy_(torch.randn(shape[-1]))
    before = x.clone()
    result = norm(x)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert result.dtype == dtype
    assert_near(result, expected, dtype)
    assert torch.equal(x, before)  # the residual stream still needs it; `.float()` is no copy in float32


def test_rms_norm_of_small_and_of_large_rows():
    norm = RMSNorm(64, eps=1e-5)
    assert norm(torch.zeros(1, 64)).equal(torch.zeros(1, 64))  # eps is what keeps this from being 0 / 0
    x = torch.randn(1, 64)
    assert_near(norm(1e-3 * x), 1e-3 * x.double() / (1e-6 * x.double().square().mean() + 1e-5).sqrt(), torch.float32)
    large = torch.full((1, 64), 6e4, dtype=torch.float16)  # its square is beyond float16
    assert_near(norm(large), torch.ones(1, 64, dtype=torch.float64), torch.float16)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_silu_and_mul(dtype):
    gate_up = torch.randn(5, 48, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_near(silu_and_mul(gate_up), gate * gate.sigmoid() * up, dtype)


# ---- RoPE ----

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256
)
ROPES = {"default": dict(rope_type="default"), "linear": dict(rope_type="linear", factor=4.0), "llama3": LLAMA3}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80])
def test_rope_equals_that_of_transformers(rope, head_dim):
    sizes = dict(hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=2048)
    config = LlamaConfig(rope_theta=10000.0, rope_scaling=ROPES[rope], **sizes)  # every transformers knows these
    positions = torch.tensor([0, 1, 2, 63, 64, 500, 2047])
    q, k = torch.randn(7, 4, head_dim), torch.randn(7, 2, head_dim)
    their_cos, their_sin = LlamaRotaryEmbedding(config)(q, positions[None])
    expected = apply_rotary_pos_emb(q, k, their_cos[0], their_sin[0], unsqueeze_dim=1)
    cos, sin = RotaryEmbedding(config)(positions, torch.float32)
    # An angle of 2,000 radians has no more digits.
    torch.testing.assert_close((rotate(q, cos, sin), rotate(k, cos, sin)), expected, rtol=0, atol=5e-5)


def test_llama3_rope_slows_down_the_slow_pairs_only():
    plain = rope_inverse_frequencies({"rope_type": "default", "rope_theta": 10000.0}, 64)
    scaled = rope_inverse_frequencies({"rope_theta": 10000.0, **LLAMA3}, 64)
    assert scaled[0] == plain[0] and scaled[-1] == plain[-1] / 8
    assert len(set((plain / scaled).tolist())) > 3  # with a passage between


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_settings_of_old_transformers(key):
    scaling = {key if name == "rope_type" else name: value for name, value in LLAMA3.items()}
    old = SimpleNamespace(rope_theta=5e5, rope_scaling=scaling)
    new = SimpleNamespace(rope_parameters={"rope_theta": 5e5, **LLAMA3})
    old_frequencies, new_frequencies = (rope_inverse_frequencies(rope_settings(config), 64) for config in (old, new))
    assert torch.equal(old_frequencies, new_frequencies)
    assert rope_settings(SimpleNamespace(rope_theta=1e4, rope_scaling=None))["rope_type"] == "default"


def test_unknown_rope_type_is_named():
    with pytest.raises(ValueError, match="RoPE type 'yarn' is not supported; supported are default, linear, llama3"):
        rope_settings(SimpleNamespace(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}))


def test_rotated_products_depend_on_the_distance_alone():
    rotary = RotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=1))
    q, k = torch.randn(1, 1, 64), torch.randn(1, 1, 64)
    near = rotate(q, *rotary(torch.tensor([15]), q.dtype)) @ rotate(k, *rotary(torch.tensor([5]), q.dtype)).mT
    far = rotate(q, *rotary(torch.tensor([1015]), q.dtype)) @ rotate(k, *rotary(torch.tensor([1005]), q.dtype)).mT
    torch.testing.assert_close(near, far, rtol=0, atol=2e-3)


# ---- Matrix products ----


def random_linear(dtype: torch.dtype, bias: bool) -> Linear:
    linear = Linear(48, 80, bias).requires_grad_(False).to(dtype)
    for parameter in linear.parameters():
        parameter.normal_()
    return linear


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 15, 16, 70])
def test_linear_is_the_same_product_packed_or_not(dtype, bias, num_rows):
    linear = random_linear(dtype, bias)
    x = torch.randn(num_rows, 48, dtype=dtype)
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    plain = linear(x)
    linear.prepack()
    for result in (plain, linear(x)):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def test_packing_lets_the_original_weight_go():
    linear = random_linear(torch.float32, bias=False)
    if pack(linear.weight) is None:
        pytest.skip("this PyTorch has no oneDNN")
    linear.prepack()
    assert linear.packed is not None and not list(linear.parameters())


def test_without_packing_the_weight_stays(monkeypatch):
    monkeypatch.setattr("nanovllm.layers.linear.pack", lambda weight: None)
    linear = random_linear(torch.float32, bias=False)
    x = torch.randn(3, 48)
    expected = linear(x)
    linear.prepack()
    assert torch.equal(linear(x), expected)


def test_product_in_float32_slice_by_slice(monkeypatch):
    monkeypatch.setattr("nanovllm.layers.linear.FLOAT32_SLICE", 32)  # 80 rows: two whole slices and a half
    linear = random_linear(torch.bfloat16, bias=True)
    x = torch.randn(20, 48, dtype=torch.bfloat16)
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    result = linear_in_float32(x, linear.weight, linear.bias)
    torch.testing.assert_close(result.double(), expected, rtol=1e-2, atol=5e-2)


def test_merged_linear_is_its_parts_side_by_side():
    merged = ColumnParallelLinear(8, {"q_proj": 3, "k_proj": 1}, 2, Ranks(), bias=True).requires_grad_(False)
    merged.weight.normal_()
    merged.bias.normal_()
    x = torch.randn(3, 8)
    q, k = merged(x).split([6, 2], dim=-1)
    torch.testing.assert_close(q, F.linear(x, merged.weight[:6], merged.bias[:6]))
    torch.testing.assert_close(k, F.linear(x, merged.weight[6:], merged.bias[6:]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head(dtype, tied):
    embedding = Embedding(100, 16, Ranks()).requires_grad_(False).to(dtype)
    embedding.weight.normal_()
    head = LMHead(embedding, tied).requires_grad_(False).to(dtype)
    if not tied:
        head.weight.normal_()
    weight, x = head.weight.clone(), torch.randn(2, 16, dtype=dtype)
    assert torch.equal(weight, embedding.weight) == tied
    head.prepack()
    logits = head(x)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=0.02, atol=5 * TOLERANCE[dtype])
    assert torch.equal(embedding(torch.tensor([7, 0])), embedding.weight[[7, 0]])  # the lookup outlives the packing
