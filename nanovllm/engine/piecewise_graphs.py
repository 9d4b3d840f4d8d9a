"""Piecewise CUDA graphs: for steps in which attention must know whose the tokens are.

In a graph of `StepGraphs` each token is a row by itself, and reads its whole context alone. For the hundreds of tokens
of a prompt, or a few dozen behind a long context, that is a waste: they should share what is read, a tile of them to a
program. But how many sequences and tiles there are differs from step to step, and a graph has no room for that.
Everything else asks only for the number of tokens: products, norms, rotations. So here the recording *stops* at every
attention layer, and another one begins behind it. A model of L layers gives L + 1 pieces; a step replays them in order,
and launches attention in between.

(The name is vLLM's, where a compiler cuts the model's code at attention. Here the model is cut while it runs: for as
long as it is recorded, its attention layers have a backend that, in the place of attending, ends a piece.)
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nanovllm.layers.attention import Attention
from nanovllm.utils.context import Context, use_context

if TYPE_CHECKING:
    from nanovllm.engine.cuda_graphs import StepGraphs


class PiecewiseGraphs:
    """For each of some buckets the pieces of a model, in order.

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
        # What attention gives in all layers, for the piece that comes next.
        shape = (max(buckets, default=0), self.layers[0].num_heads, self.layers[0].head_dim)
        self.output = graphs.hidden_states.new_zeros(shape)
        self.pieces: dict[int, list[torch.cuda.CUDAGraph]] = {}
        self.queries: dict[int, list[torch.Tensor]] = {}  # what each piece but the last leaves for attention

    def capture(self, bucket: int, stream: torch.cuda.Stream) -> None:
        """Record a bucket's pieces, with the inputs that are in the buffers."""
        pieces: list[torch.cuda.CUDAGraph] = []
        queries: list[torch.Tensor] = []
        self.pieces[bucket], self.queries[bucket] = pieces, queries

        def begin() -> None:
            piece = torch.cuda.CUDAGraph()
            piece.capture_begin(pool=self.graphs.pool)
            pieces.append(piece)

        def cut(query: torch.Tensor) -> None:
            pieces[-1].capture_end()
            queries.append(not_held(query))
            begin()

        self.run(bucket, lambda query: None)  # compiles kernels and chooses algorithms, which a capture must not
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a recording cannot take what that has left
        with torch.cuda.stream(stream):
            begin()
            try:
                self.run(bucket, cut)
            except BaseException:
                with suppress(RuntimeError):  # it may have ended already; what is told is what went wrong
                    pieces[-1].capture_end()
                raise
            pieces[-1].capture_end()

    def run(self, bucket: int, in_the_place_of_attention: Callable[[torch.Tensor], None]) -> None:
        """Hidden states of the bucket's tokens, but for attention, whose outputs are taken as found."""

        def attend(query: torch.Tensor, *_: Any) -> torch.Tensor:
            in_the_place_of_attention(query)
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

    def replay(
        self,
        bucket: int,
        input_ids: np.ndarray,
        positions: np.ndarray,
        rows: np.ndarray,
        prepare: Callable[[], Context],
    ) -> torch.Tensor:
        """As `StepGraphs.replay`; what attention must know, `prepare` works out during the first piece."""
        graphs, n = self.graphs, len(input_ids)
        graphs.fill_tokens(bucket, input_ids, positions, rows)
        first, *others = self.pieces[bucket]
        first.replay()
        context = prepare()
        context.plan = self.backend.plan(context, self.layers[0].k_cache)
        for query, layer, piece in zip(self.queries[bucket], self.layers, others, strict=True):
            self.backend.attend(query[:n], layer.k_cache, layer.v_cache, context, layer.scale, self.output[:n])
            piece.replay()
        return graphs.hidden_states[:n]


def not_held(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers at the same address on a GPU, of memory that may be given to others nevertheless.

    A piece leaves its queries in the graphs' memory. Held there for every layer and bucket, those of Qwen3-0.6B would
    take gigabytes; but once attention has read them, the pieces that follow may write over them.
    """
    if not tensor.is_cuda:
        return tensor
    numbers = tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])  # the protocol has no name for bfloat16
    place = SimpleNamespace(__cuda_array_interface__=numbers.__cuda_array_interface__)
    found = torch.as_tensor(place, device=tensor.device).view(tensor.dtype)
    assert found.data_ptr() == tensor.data_ptr(), "torch has made a copy"
    return found
