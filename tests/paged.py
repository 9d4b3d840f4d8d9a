"""Paged batches made by hand: what the engine does for a model, in a few lines."""

from dataclasses import dataclass, field

import torch
from torch import nn

from nanovllm.kernels import get_backend
from nanovllm.layers.attention import Attention
from nanovllm.utils.context import Context, use_context


def slots_of(block_table: list[int], positions: range, block_size: int) -> list[int]:
    return [block_table[p // block_size] * block_size + p % block_size for p in positions]


def make_context(
    block_size: int, block_tables: list[list[int]], query_lens: list[int], context_lens: list[int], device: str = "cpu"
) -> Context:
    """A step in which sequence i computes the last query_lens[i] of its context_lens[i] tokens. Decodes stand first."""
    starts = [sum(query_lens[:i]) for i in range(len(query_lens) + 1)]
    width = max(map(len, block_tables))
    # A number that no cache has a block for: nobody may follow it.
    padded = [table + [1_000_000] * (width - len(table)) for table in block_tables]
    slots = [
        slots_of(table, range(context_len - query_len, context_len), block_size)
        for table, query_len, context_len in zip(block_tables, query_lens, context_lens, strict=True)
    ]
    num_decodes = query_lens.count(1)
    assert query_lens[:num_decodes] == [1] * num_decodes, "decodes stand first"
    return Context(
        block_size=block_size,
        num_decodes=num_decodes,
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables=torch.tensor(padded, dtype=torch.int32, device=device),
        slot_mapping=torch.tensor(sum(slots, []), device=device),
    )


@dataclass
class PagedModel:
    """A model and a KV cache, in which each sequence has blocks of its own, scattered over the cache."""

    model: nn.Module
    block_size: int = 16
    num_blocks: int = 128
    dtype: torch.dtype = torch.float32
    block_tables: dict[str, list[int]] = field(default_factory=dict)
    num_computed: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        backend = get_backend("torch")
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        shape = (self.block_size, layers[0].num_kv_heads, layers[0].head_dim)
        kv_cache = backend.allocate(len(layers), self.num_blocks, *shape, self.dtype, "cpu")
        for i, layer in enumerate(layers):
            layer.bind(backend, kv_cache[0, i], kv_cache[1, i])
        self.free_blocks = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(0)).tolist()

    @torch.inference_mode()
    def step(self, chunks: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        """Compute the next tokens of some sequences in one flat batch; their logits, `[tokens, vocab_size]` each."""
        chunks = dict(sorted(chunks.items(), key=lambda item: len(item[1]) > 1))
        positions: list[int] = []
        for name, tokens in chunks.items():
            start = self.num_computed.setdefault(name, 0)
            self.num_computed[name] = start + len(tokens)
            positions += range(start, start + len(tokens))
            table = self.block_tables.setdefault(name, [])
            while len(table) * self.block_size < start + len(tokens):
                table.append(self.free_blocks.pop())
        context = make_context(
            self.block_size,
            [self.block_tables[name] for name in chunks],
            [len(tokens) for tokens in chunks.values()],
            [self.num_computed[name] for name in chunks],
        )
        with use_context(context):
            hidden_states = self.model(torch.tensor(sum(chunks.values(), [])), torch.tensor(positions))
        logits = self.model.compute_logits(hidden_states)
        return dict(zip(chunks, logits.split([len(tokens) for tokens in chunks.values()])))
