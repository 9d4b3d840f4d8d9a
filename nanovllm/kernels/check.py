"""Which attention backend "auto" is, and whether it computes what it should on this very device."""

import logging
from types import ModuleType

import torch

from nanovllm.kernels import get_backend
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

    It is never flash_attn: in a run beside ours FlashAttention 2 was a little faster at some decodes, slower at prompts and
    over all (`docs/performance.md`), and blocks of 256 tokens keep the beginnings of short prompts out of the prefix cache.
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
