"""CUDA graphs: a step is recorded once, and replayed with other numbers in the same places.

A small decode step keeps a GPU busy for less time than Python needs to launch its hundreds of kernels. A CUDA graph is
the list of those launches, with their addresses: one call replays it. The price is that nothing may change but the
contents of the tensors that were used at capture. So the number of tokens is rounded up to the next of a few
*buckets*, there is a graph for each, and a step writes its token ids, positions and rows into buffers that never move.

In a graph each token is a row by itself: it has a block table of its own, that of its sequence, and looks back on all
positions up to its own. So a graph does not care whose tokens they are: decodes, the chunks of short prompts, or both.
That works because a layer stores the keys and values of all tokens before any of them attends. (Steps in which it would
be slow, such as long chunks, go by `piecewise_graphs.py`; `buckets.py` tells which.)
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from nanovllm.engine.buckets import bucket_of, buckets_up_to, piecewise_buckets_up_to
from nanovllm.engine.piecewise_graphs import PiecewiseGraphs
from nanovllm.utils.context import Context, use_context

# What CUDA itself keeps of a recording, rounded up: for each layer in one of a whole step, and for each piece. On an
# H100 it was 48 and 130 kB, with the sizes of Qwen3-0.6B.
BYTES_PER_LAYER = 64 << 10
BYTES_PER_PIECE = 256 << 10

# And NCCL, where there are several ranks, of each exchange in it: some 130 kB with two H100s and with four.
BYTES_PER_EXCHANGE = 160 << 10


class StepGraphs:
    """A graph of the model for each bucket, and one of the head and the sampler; all graphs share one pool of memory.

    Args:
        model: as in `nanovllm.models`, bound to a KV cache of `num_blocks` blocks and the dummy block after them.
        num_rows: rows of the table of block tables, one for each sequence that runs.
        max_num_blocks: blocks of the longest sequence there can be.
        max_num_tokens: the token budget of a step.
        max_num_seqs: how many sequences can be sampled in a step.
        is_trial: record only the largest size of each kind, whose memory all the others of the kind will share.
    """

    def __init__(
        self,
        model: nn.Module,
        block_size: int,
        num_blocks: int,
        num_rows: int,
        max_num_blocks: int,
        max_num_tokens: int,
        max_num_seqs: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        is_trial: bool = False,
    ) -> None:
        self.model, self.block_size, self.padding_row = model, block_size, num_rows
        self.buckets = buckets_up_to(max_num_tokens)
        self.sample_buckets = buckets_up_to(min(max_num_seqs, self.buckets[-1]))
        in_pieces = piecewise_buckets_up_to(max_num_tokens, longest=max_num_blocks * block_size)
        largest, most_sampled = max(self.buckets + in_pieces), self.sample_buckets[-1]

        # What a step writes: ids, positions and rows of its tokens; of those it samples hidden rows, rows, random bits
        # and temperatures.
        self.inputs = torch.zeros(3 * largest, dtype=torch.int64, device=device)
        self.sample_inputs = torch.zeros(4 * most_sampled, dtype=torch.int64, device=device)
        # What changes rarely. The last row is for padding: a block table that leads to the dummy block only.
        self.block_tables = torch.full((num_rows + 1, max_num_blocks), num_blocks, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)  # sampled last in each row
        # What it leaves behind.
        self.hidden_states = torch.zeros(largest, hidden_size, dtype=dtype, device=device)
        self.token_ids = torch.zeros(most_sampled, dtype=torch.int64, device=device)

        self.query_start = torch.arange(self.buckets[-1] + 1, dtype=torch.int32, device=device)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.sample_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.piecewise = PiecewiseGraphs(self, in_pieces)
        self.capture(device, is_trial)

    @torch.inference_mode()
    def capture(self, device: torch.device, is_trial: bool) -> None:
        """Record the graphs, the largest first: the smaller ones then find room in its memory."""
        gc.collect()  # graphs of an engine that is gone: CUDA does not let them go while it records
        start = perf_counter()
        kinds = [
            (self.piecewise.capture, self.piecewise.buckets),
            (self.capture_model, self.buckets),
            (self.capture_sampler, self.sample_buckets),
        ]
        most = 1 if is_trial else None
        todo = [(capture, bucket) for capture, buckets in kinds for bucket in buckets[::-1][:most]]
        with capture_stream(device) as stream:
            for capture, bucket in tqdm(todo, desc="Capturing CUDA graphs", unit=" sizes", delay=1, disable=is_trial):
                self.inputs.fill_(0)
                self.inputs[2 * bucket : 3 * bucket] = self.padding_row  # all is padding: it writes to the dummy block
                capture(bucket, stream)
        torch.cuda.synchronize(device)
        self.num_sizes, self.seconds = len(todo), perf_counter() - start

    def bytes_kept_by_cuda(self, num_ranks: int) -> int:
        """What CUDA and NCCL will keep for the graphs of all sizes, beside the memory that these share."""
        num_layers, num_in_pieces = len(self.piecewise.layers), len(self.piecewise.buckets)
        kept = len(self.buckets) * num_layers * BYTES_PER_LAYER
        kept += (num_in_pieces * (num_layers + 1) + len(self.sample_buckets)) * BYTES_PER_PIECE  # these are as small
        if num_ranks > 1:  # after the embedding, after each attention and each MLP; and before a sampler
            num_exchanges = (len(self.buckets) + num_in_pieces) * (2 * num_layers + 1) + len(self.sample_buckets)
            kept += num_exchanges * BYTES_PER_EXCHANGE
        return kept

    def capture_model(self, bucket: int, stream: torch.cuda.Stream) -> None:
        self.graphs[bucket] = self.record(self.run_model, bucket, stream)

    def capture_sampler(self, bucket: int, stream: torch.cuda.Stream) -> None:
        self.sample_graphs[bucket] = self.record(self.run_sampler, bucket, stream)

    def record(self, run: Callable[[int], None], bucket: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        run(bucket)  # compiles kernels and chooses algorithms, which a capture must not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream):
            run(bucket)
        return graph

    # -- What is recorded ----------------------------------------------------------------------------------------------

    def run_model(self, bucket: int) -> None:
        """Hidden states of the bucket's tokens."""
        input_ids, positions, rows = self.tokens_of(bucket)
        context = Context(
            block_size=self.block_size,
            num_decodes=bucket,
            query_start=self.query_start[: bucket + 1],
            context_lens=(positions + 1).int(),
            block_tables=self.block_tables.index_select(0, rows),  # [bucket, max_num_blocks]
            slot_mapping=self.slots_of(positions, rows),
        )
        with use_context(context):
            self.hidden_states[:bucket] = self.model(input_ids, positions)

    def tokens_of(self, bucket: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, positions and rows of the bucket's tokens, `[bucket]` each."""
        input_ids, positions, rows = self.inputs[: 3 * bucket].view(3, bucket)
        return self.known(input_ids, rows), positions, rows

    def slots_of(self, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Where keys and values of some tokens go, `[num_tokens]`."""
        blocks = self.block_tables[rows, positions // self.block_size]
        return blocks.long() * self.block_size + positions % self.block_size

    def run_sampler(self, bucket: int) -> None:
        """Tokens for some of the hidden states, greedy or by temperature."""
        from nanovllm.kernels.triton_sampler import sample  # it needs Triton; all else here can be read anywhere

        at, rows, bits, temperature = self.sample_inputs[: 4 * bucket].view(4, bucket)
        logits = self.model.compute_logits(self.hidden_states[at])  # type: ignore[operator]
        self.token_ids[:bucket] = sample(logits, temperature.view(torch.float64).float(), bits)
        self.remember(rows, self.token_ids[:bucket])

    def remember(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Keep what was sampled for each row, for a step that is launched before Python knows it."""
        self.last_tokens.index_copy_(0, rows, token_ids.clamp(min=0))  # -1, NO_TOKEN: any will do, nobody reads on

    def known(self, input_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Token ids in which those that Python did not know, `IN_FLIGHT`, are what their row has sampled since."""
        return torch.where(input_ids < 0, self.last_tokens[rows], input_ids)

    # -- What a step does ----------------------------------------------------------------------------------------------

    def replay(self, bucket: int, input_ids: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """Hidden states of a step's tokens, `[num_tokens, hidden_size]`, valid until the next replay.

        `rows` says for each token in which row of the table its sequence's block table stands.
        """
        self.fill_tokens(bucket, input_ids, positions, rows)
        self.graphs[bucket].replay()
        return self.hidden_states[: len(input_ids)]

    def fill_tokens(self, bucket: int, input_ids: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> None:
        """Write a step's tokens where the graphs of their bucket read them."""
        self.fill(bucket, self.inputs, [input_ids, positions, rows], padding=[0, 0, self.padding_row])

    def samples_at_once(self, num_sampled: int) -> bool:
        """Whether there is a graph to sample so many sequences."""
        return num_sampled <= self.sample_buckets[-1]

    def sample(
        self, hidden_states: torch.Tensor, at: np.ndarray, rows: np.ndarray, bits: np.ndarray, temperature: np.ndarray
    ) -> torch.Tensor:
        """Tokens for rows `at` of the hidden states, `[num_sampled]`: a copy, which the next replay does not touch."""
        num_sampled, bucket = len(at), bucket_of(len(at))
        assert bucket is not None  # see `samples_at_once`
        if hidden_states.data_ptr() != self.hidden_states.data_ptr():  # of a step too large for a graph
            self.hidden_states[:num_sampled] = hidden_states[copied(at, hidden_states.device)]
            at = np.arange(num_sampled)
        inputs = [at, rows, bits, temperature.astype(np.float64).view(np.int64)]
        self.fill(bucket, self.sample_inputs, inputs, padding=[0, self.padding_row, 0, 0])
        self.sample_graphs[bucket].replay()
        return self.token_ids[:num_sampled].clone()

    def fill(self, bucket: int, buffer: torch.Tensor, inputs: list[np.ndarray], padding: list[int]) -> None:
        """Write `inputs`, `[n]` int64 each, where a bucket's graph reads them, behind each its kind of `padding`."""
        padded = np.empty((len(inputs), bucket), np.int64)
        for row, numbers, rest in zip(padded, inputs, padding, strict=True):
            row[: len(numbers)] = numbers
            row[len(numbers) :] = rest
        buffer[: padded.size].copy_(pinned(padded.ravel()), non_blocking=True)

    def add_blocks(self, rows: np.ndarray, places: np.ndarray, blocks: np.ndarray) -> None:
        """Write physical blocks to their places in the block tables of some rows, `[n]` each."""
        at, values = copied(np.stack([rows * self.block_tables.size(1) + places, blocks]), self.block_tables.device)
        self.block_tables.view(-1).index_copy_(0, at, values.int())


@contextmanager
def capture_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A stream to capture on, of this GPU and no other's: PyTorch's own for captures stays on the one that came first.

    cuBLAS keeps a workspace for each stream that it has seen: for this one, in the graphs' pool. Let go of, it is
    theirs alone, and ends with them. (What lets it go is private in PyTorch, but has been there since 2.1.)
    """
    try:
        yield torch.cuda.Stream(device)
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def pinned(array: np.ndarray) -> torch.Tensor:
    """A copy in memory that a GPU reads by itself, while Python goes on.

    PyTorch lends such memory, and does not lend it again before the copy from it is done.
    """
    return torch.from_numpy(array).pin_memory()


def copied(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device, for which nobody here waits."""
    return pinned(array).to(device, non_blocking=True)
