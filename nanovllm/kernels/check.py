"""Which attention backend "auto" is, and whether it and the small kernels are right on this very device."""

import logging
from types import ModuleType

import numpy as np
import torch

from nanovllm.kernels import get_backend
from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import norm_and_rotate, rotate
from nanovllm.layers.sampler import SamplingBatch, random_bits, sample, uniform_numbers
from nanovllm.utils.context import Context

logger = logging.getLogger(__name__)


def choose_backend(
    name: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> ModuleType:
    """The backend that a setting means: "auto" is triton on a GPU where its kernels work, and torch everywhere else.

    It is never flash_attn: in a run beside ours FlashAttention 2 was a little faster at some decodes, slower at prompts
    and over all (`docs/performance.md`), and blocks of 256 tokens keep the beginnings of short prompts out of the
    prefix cache.
    """
    if name != "auto":
        return get_backend(name, device, dtype, block_size, head_dim)
    if device.type == "cuda":
        try:
            triton = get_backend("triton", device)
            check(triton, num_heads, num_kv_heads, head_dim, block_size, dtype, device)
            return triton
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a driver may raise
            logger.warning(
                "the Triton kernels do not work here, attention falls back to torch, which is slower: %s", error
            )
    return get_backend("torch")


@torch.inference_mode()
def check(
    backend: ModuleType,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Compare a backend with the reference, token by token. RuntimeError if they differ.

    A small step with all there is: a decode with a long context, one with a short, and a chunk. Then the decodes alone,
    as in a CUDA graph, for there the programs may have other sizes.
    """
    query_lens, context_lens = [1, 1, 20], [1200, 3, 50]
    num_blocks = [-(-n // block_size) for n in context_lens]
    ends = torch.tensor(num_blocks).cumsum(0)
    tables = torch.arange(max(num_blocks)) + (ends - torch.tensor(num_blocks)).unsqueeze(1)  # [3, max_blocks]
    positions = [torch.arange(context_len) for context_len in context_lens]
    slots = torch.cat([table[p // block_size] * block_size + p % block_size for table, p in zip(tables, positions)])
    numbers = torch.Generator().manual_seed(0)

    def random(num_tokens: int, num_heads: int) -> torch.Tensor:
        return torch.randn(num_tokens, num_heads, head_dim, generator=numbers).to(device, dtype)

    query = random(sum(query_lens), num_heads)
    key, value = (random(len(slots), num_kv_heads) for _ in range(2))
    outputs: list[list[torch.Tensor]] = []
    for module in (backend, get_backend("torch")):
        shape = (1, int(ends[-1]), block_size, num_kv_heads, head_dim)
        k_cache, v_cache = module.allocate(*shape, dtype, device)[:, 0]
        module.store(key, value, k_cache, v_cache, slots.to(device))
        outputs.append([])
        for num_seqs, num_tokens in ((3, 22), (2, 2)):
            context = Context(
                block_size=block_size,
                num_decodes=2,
                query_start=torch.tensor([0, 1, 2, 22][: num_seqs + 1], dtype=torch.int32, device=device),
                context_lens=torch.tensor(context_lens[:num_seqs], dtype=torch.int32, device=device),
                block_tables=tables[:num_seqs].to(device, torch.int32),
                slot_mapping=slots.to(device),
            )
            context.plan = module.plan(context, k_cache)
            outputs[-1].append(module.attend(query[:num_tokens], k_cache, v_cache, context, head_dim**-0.5))
    actual, expected = (torch.cat(parts).flatten(1).double() for parts in outputs)  # [24, num_heads * head_dim]
    error = ((actual - expected).norm(dim=1) / expected.norm(dim=1)).max()
    if not error < 0.02:  # bfloat16 gives some 0.005; NaN is not smaller than anything
        raise RuntimeError(f"{backend.__name__} differs from the reference by {error.item():.1%}")


@torch.inference_mode()
def check_small_kernels(
    layers: ModuleType, sampler: ModuleType, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Compare `triton_layers` and `triton_sampler` with the plain layers on a CPU. RuntimeError if they differ.

    `layers` and `sampler` are those modules.
    """
    numbers = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers).to(dtype)

    def there(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.to(device, copy=True) for tensor in tensors]

    norms = [RMSNorm(size, 1e-6).to(dtype) for size in (80, 48, 48)]
    for each in norms:
        each.weight.copy_(random(len(each.weight)))
    norm, q_norm, k_norm = norms
    x, delta, gate_up, qk = random(3, 80), random(3, 80), random(3, 2 * 80), random(3, 5, 48)
    angles = random(3, 1, 24)
    cos, sin = torch.cat((angles.cos(), angles.cos()), dim=-1), torch.cat((-angles.sin(), angles.sin()), dim=-1)
    stream = there(x)[0]  # its kernel adds in place, as the layer does
    actual = {
        "rms_norm": layers.rms_norm(*there(x, norm.weight), norm.eps),
        "rms_norm of a sum": layers.rms_norm(stream, *there(norm.weight), norm.eps, *there(delta)),
        "the sum": stream,
        "rotate": layers.rotate(*there(qk, cos, sin)),
        "rotate with norms": layers.rotate(*there(qk, cos, sin), 3, *there(q_norm.weight, k_norm.weight), q_norm.eps),
        "silu_and_mul": layers.silu_and_mul(*there(gate_up)),
    }
    expected = {
        "rms_norm": norm(x),
        "rms_norm of a sum": norm(x.clone(), delta),
        "the sum": x + delta,
        "rotate": rotate(qk, cos, sin),
        "rotate with norms": norm_and_rotate(qk, q_norm, k_norm, 3, cos, sin),
        "silu_and_mul": silu_and_mul(gate_up),
    }
    for name, tensor in expected.items():
        error = (actual[name].cpu().double() - tensor.double()).norm() / tensor.double().norm()
        if not error < 0.02:  # bfloat16 gives some 0.004
            raise RuntimeError(f"{name} differs from the plain layer by {error.item():.1%}")

    # Greedy, and at random from a few tokens in two pieces of the vocabulary.
    logits, temperature, places = random(8, 5000), np.array([0, 0, 1, 1, 1, 1, 1, 1], np.float32), np.arange(8)
    logits[2:, [17, 2000, 4095, 4999]] = 20
    nothing = np.zeros(8), np.ones(8), np.zeros(8)
    plain = sample(logits, SamplingBatch.from_host(temperature, *nothing, uniform_numbers(places, places)))
    bits = torch.from_numpy(random_bits(places, places).view(np.int64))
    if (found := sampler.sample(*there(logits, torch.from_numpy(temperature), bits)).tolist()) != plain.tolist():
        raise RuntimeError(f"the sampler has drawn {found}, and the plain one {plain.tolist()}")
