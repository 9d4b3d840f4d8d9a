"""Piecewise CUDA graphs: for steps of so many tokens that attention must know whose they are.

In a graph of `StepGraphs` each token is a row by itself, and reads its whole context alone. For the hundreds of tokens of
a prompt that would be a waste: they should share what is read, a tile of them to a program. But how many sequences and
tiles there are differs from step to step, and a graph has no room for that. Everything else asks only for the number of
tokens: products, norms, rotations. So here the recording *stops* at every attention layer, and another one begins behind
it. A model of L layers gives L + 1 pieces; a step replays them in order, and launches attention in between.

(The name is vLLM's, where a compiler cuts the model's code at attention. Here the model is cut while it runs: for as long
as it is recorded, its attention layers have a backend that, in the place of attending, ends a piece.)
"""

import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nanovllm.layers.attention import Attention
from nanovllm.utils.context import Context, use_context

if TYPE_CHECKING:
    from nanovllm.engine.cuda_graphs import StepGraphs


class PiecewiseGraphs:
    """For each of some large buckets the pieces of a model, in order.

    Args:
        graphs: those of whole steps, whose model, tables, buffers and memory these share.
        buckets: numbers of tokens, in ascending order.
    """

    def __init__(self, graphs: "StepGraphs", buckets: Sequence[int]) -> None:
        # They hold these: in a circle neither would be let go of before Python looks for circles.
        self.graphs: StepGraphs = weakref.proxy(graphs)
        self.buckets = buckets
        self.layers = [module for module in graphs.model.modules() if isinstance(module, Attention)]
        self.backend = self.layers[0].backend
        # Where pieces and attention meet, in all layers: a piece leaves its queries, the next one finds their outputs.
        shape = (max(buckets, default=0), self.layers[0].num_heads, self.layers[0].head_dim)
        self.query = graphs.hidden_states.new_zeros(shape)
        self.output = graphs.hidden_states.new_zeros(shape)
        self.pieces: dict[int, list[torch.cuda.CUDAGraph]] = {}

    def capture(self, bucket: int, stream: torch.cuda.Stream) -> None:
        """Record a bucket's pieces, with the inputs that are in the buffers."""
        pieces = self.pieces[bucket] = []

        def begin() -> None:
            pieces.append(torch.cuda.CUDAGraph())
            pieces[-1].capture_begin(pool=self.graphs.pool)

        def cut() -> None:
            pieces[-1].capture_end()
            begin()

        self.run(bucket, lambda: None)  # compiles kernels and chooses algorithms, which a capture must not
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            begin()
            try:
                self.run(bucket, cut)
            finally:
                pieces[-1].capture_end()

    def run(self, bucket: int, in_the_place_of_attention: Callable[[], None]) -> None:
        """Hidden states of the bucket's tokens, but for attention: its queries are left, its outputs taken as found."""

        def attend(query: torch.Tensor, *_: Any) -> torch.Tensor:
            self.query[:bucket] = query
            in_the_place_of_attention()
            return self.output[:bucket]

        graphs, cutting = self.graphs, SimpleNamespace(store=self.backend.store, attend=attend)
        input_ids, positions, rows = graphs.tokens_of(bucket)
        nobody = rows[:0].int()  # whose the tokens are only attention would ask
        context = Context(graphs.block_size, 0, nobody, nobody, nobody, graphs.slots_of(positions, rows), plan="none")
        try:
            for layer in self.layers:
                layer.backend = cutting  # type: ignore[assignment]
            with use_context(context):
                graphs.hidden_states[:bucket] = graphs.model(input_ids, positions)
        finally:
            for layer in self.layers:
                layer.backend = self.backend

    def replay(self, input_ids: np.ndarray, positions: np.ndarray, rows: np.ndarray, context: Context) -> torch.Tensor:
        """As `StepGraphs.replay`; `context` is what attention must know."""
        num_tokens = len(input_ids)
        context.plan = self.backend.plan(context, self.layers[0].k_cache)
        graphs = self.graphs
        bucket = graphs.fill(graphs.inputs, np.stack([input_ids, positions, rows]), [0, 0, graphs.padding_row])
        *pieces, last = self.pieces[bucket]
        query = self.query[:num_tokens]
        for piece, layer in zip(pieces, self.layers, strict=True):
            piece.replay()
            self.output[:num_tokens] = self.backend.attend(query, layer.k_cache, layer.v_cache, context, layer.scale)
        last.replay()
        return graphs.hidden_states[:num_tokens]
