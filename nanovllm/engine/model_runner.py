"""The model runner: a scheduled batch becomes tensors, the tensors become logits, the logits become tokens."""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PretrainedConfig

from nanovllm.config import Config
from nanovllm.engine.kv_cache import MemoryUse, block_bytes, size_kv_cache
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.check import choose_backend
from nanovllm.layers.attention import Attention
from nanovllm.layers.sampler import SamplingBatch, random_bits, sample, top_logprobs, uniform_numbers
from nanovllm.utils.context import Context, use_context
from nanovllm.utils.loader import build_model

if TYPE_CHECKING:  # it needs Triton, so only a GPU's engine imports it
    from nanovllm.engine.cuda_graphs import StepGraphs


IN_FLIGHT = -1  # in the place of a token id


class LaunchedStep:
    """A step on its way: `tokens()` waits for its result, so that there is time to do something else before."""

    def __init__(self, token_ids: torch.Tensor, logprobs: dict[int, dict[int, float]]) -> None:
        self._token_ids = token_ids  # [num_sampled]
        self.logprobs = logprobs  # sequence id -> token id -> log-probability, where a request asked for it
        self.times: dict[str, float] = {}  # seconds for "prepare", "forward" and "sample"
        self._arrived: torch.cuda.Event | None = None
        if token_ids.is_cuda:  # a copy of its own, which does not wait for what is launched after it
            self._token_ids = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
            self._token_ids.copy_(token_ids, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tokens(self) -> list[int]:
        """The sampled tokens, one for each scheduled sequence with `samples`, in the order of the batch."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._token_ids.tolist()


@dataclass(slots=True)
class StepTokens:
    """The tokens of a step on the host, sequence after sequence."""

    rows: np.ndarray  # [num_seqs]: where each sequence's block table and settings stand
    num_new: np.ndarray  # [num_seqs]: tokens of each
    ends: np.ndarray  # [num_seqs]: where each one's tokens end in the batch
    context_lens: np.ndarray  # [num_seqs]: tokens each can look back on, the new ones included
    owner: np.ndarray  # [num_tokens]: whose each token is
    positions: np.ndarray  # [num_tokens]: where in its sequence it stands
    input_ids: np.ndarray  # [num_tokens]; `IN_FLIGHT` for one that a step in flight samples


class ModelRunner:
    """Owns the model and its KV cache, and runs batches on them.

    Sequences that run have a row each in tables of what changes rarely: their block tables and sampling settings. So a
    step copies only what is new, and gathers the rest by row, for all sequences at once.
    """

    def __init__(self, config: Config, hf_config: PretrainedConfig, path: Path) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, hf_config, self.device)
        self.block_size = config.block_size
        self.model = build_model(hf_config, path, self.dtype, self.device, config.load_format)

        # A row for each sequence that runs.
        num_rows = config.max_num_seqs
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int64)
        self.top_p = np.zeros(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.seed = np.zeros(num_rows, np.int64)
        self.truncates = np.zeros(num_rows, bool)  # draws at random, from fewer tokens than all

        attention = [module for module in self.model.modules() if isinstance(module, Attention)]
        heads = (attention[0].num_heads, attention[0].num_kv_heads, attention[0].head_dim)
        backend = choose_backend(config.attention_backend, *heads, config.block_size, self.dtype, self.device)
        self.has_sampling_kernel = self.device.type == "cuda" and backend.__name__.endswith("triton_attention")
        has_graphs = self.has_sampling_kernel and not config.enforce_eager

        shape = (config.block_size, *heads[1:])
        self.bytes_per_block = block_bytes(len(attention), *shape, self.dtype)
        self.memory = MemoryUse()
        if self.device.type == "cuda":
            self.memory.weights = sum(parameter.nbytes for parameter in self.model.parameters())
            self.bind(attention, backend, backend.allocate(len(attention), 0, *shape, self.dtype, self.device))
            self.memory.step = self.measure_step(config)
            if has_graphs:
                from nanovllm.engine.cuda_graphs import memory_of_graphs

                self.memory.graphs = memory_of_graphs(config.max_num_batched_tokens, config.max_num_seqs)
        reserved = self.memory.step + self.memory.graphs
        self.num_blocks = size_kv_cache(config, self.bytes_per_block, self.device, reserved)
        self.kv_cache = backend.allocate(len(attention), self.num_blocks, *shape, self.dtype, self.device)
        self.memory.kv_cache = self.kv_cache.nbytes
        self.bind(attention, backend, self.kv_cache)

        # None of those that run can be longer than the cache, so neither need its block table be.
        longest = config.max_model_len or hf_config.max_position_embeddings
        max_num_blocks = min(self.num_blocks, -(-longest // config.block_size))
        self.block_tables = np.zeros((num_rows, max_num_blocks), np.int32)
        self.num_copied_blocks = [0] * num_rows
        self.graphs = self.capture_graphs(config, hf_config) if has_graphs else None
        if self.device.type == "cuda":
            self.memory.log()

    def bind(self, attention: list[Attention], backend: ModuleType, kv_cache: torch.Tensor) -> None:
        for layer, (k_cache, v_cache) in zip(attention, kv_cache.transpose(0, 1), strict=True):
            layer.bind(backend, k_cache, v_cache)

    @torch.inference_mode()
    def measure_step(self, config: Config) -> int:
        """Bytes that a step takes in between, at most: one with all the tokens and all the logits that there can be.

        Its keys and values go to the dummy block, the only one that there is so far.
        """
        num_tokens = config.max_num_batched_tokens
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        context = Context(
            block_size=self.block_size,
            num_decodes=0,
            query_start=torch.tensor([0, num_tokens], dtype=torch.int32, device=self.device),
            context_lens=torch.tensor([num_tokens], dtype=torch.int32, device=self.device),
            block_tables=torch.zeros(1, -(-num_tokens // self.block_size), dtype=torch.int32, device=self.device),
            slot_mapping=torch.zeros(num_tokens, dtype=torch.int64, device=self.device),
        )
        positions = torch.arange(num_tokens, device=self.device)
        with use_context(context):
            hidden_states = self.model(torch.zeros_like(positions), positions)
        rows = np.zeros(min(config.max_num_seqs, num_tokens), np.int64)
        self.choose(self.model.compute_logits(hidden_states[: len(rows)]), rows, rows)  # type: ignore[operator]
        return torch.cuda.max_memory_allocated(self.device) - before

    def capture_graphs(self, config: Config, hf_config: PretrainedConfig) -> "StepGraphs":
        from nanovllm.engine.cuda_graphs import StepGraphs

        graphs = StepGraphs(
            self.model,
            self.block_size,
            self.num_blocks,
            num_rows=config.max_num_seqs,
            max_num_blocks=self.block_tables.shape[1],
            max_num_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            hidden_size=hf_config.hidden_size,
            dtype=self.dtype,
            device=self.device,
        )
        self.memory.graphs = graphs.memory
        return graphs

    @torch.inference_mode()
    def launch(self, batch: Batch) -> LaunchedStep:
        """Start a step: compute all its tokens, and sample for each sequence whose last token is among them.

        Attention wants sequences with a single new token first, so the batch is put in that order.
        """
        start = perf_counter()
        batch.scheduled.sort(key=lambda s: s.num_new_tokens > 1)
        tokens = self.collect(batch)
        if self.graphs is not None and len(tokens.input_ids) <= self.graphs.buckets[-1]:
            prepared = perf_counter()
            rows = tokens.rows[tokens.owner]
            hidden_states = self.graphs.replay(tokens.input_ids, tokens.positions, rows)  # [num_tokens, hidden_size]
        else:
            input_ids, positions, context = self.prepare(tokens)
            if self.graphs is not None:
                input_ids = self.graphs.known(input_ids, self.to_device(tokens.rows[tokens.owner]))
            prepared = perf_counter()
            with use_context(context):
                hidden_states = self.model(input_ids, positions)  # [num_tokens, hidden_size]
        computed = perf_counter()
        launched = self.sample(batch, tokens.ends - 1, hidden_states)
        sampled = perf_counter()
        launched.times = {"prepare": prepared - start, "forward": computed - prepared, "sample": sampled - computed}
        return launched

    def collect(self, batch: Batch) -> StepTokens:
        """The tokens of a step; block tables that have grown are brought up to date."""
        scheduled = batch.scheduled
        for seq in batch.admitted:
            self.fill_row(seq)
        if batch.admitted and self.graphs is not None:
            rows = np.array([seq.row for seq in batch.admitted])
            self.graphs.write(self.graphs.temperature, rows, self.temperature[rows])
        grown: list[tuple[int, int]] = []  # (row, entry) of new blocks
        for s in scheduled:
            row, block_table = s.seq.row, s.seq.block_table
            copied = self.num_copied_blocks[row]
            if copied < len(block_table):
                self.block_tables[row, copied : len(block_table)] = block_table[copied:]
                self.num_copied_blocks[row] = len(block_table)
                grown += [(row, i) for i in range(copied, len(block_table))]
        if grown and self.graphs is not None:
            rows, entries = np.array(grown).T
            places = rows * self.block_tables.shape[1] + entries
            self.graphs.write(self.graphs.block_tables.view(-1), places, self.block_tables[rows, entries])

        starts = np.array([s.num_computed_tokens for s in scheduled])
        num_new = np.array([s.num_new_tokens for s in scheduled])
        # From here on one entry a token.
        owner = np.repeat(np.arange(len(scheduled)), num_new)
        ends = np.cumsum(num_new)
        token_ids = []
        for s in scheduled:
            token_ids += s.seq.token_ids[s.num_computed_tokens : s.num_computed_tokens + s.num_new_tokens]
            if s.num_computed_tokens + s.num_new_tokens > len(s.seq.token_ids):
                token_ids.append(IN_FLIGHT)
        return StepTokens(
            rows=np.array([s.seq.row for s in scheduled]),
            num_new=num_new,
            ends=ends,
            context_lens=starts + num_new,
            owner=owner,
            positions=np.arange(len(owner)) - (ends - num_new)[owner] + starts[owner],
            input_ids=np.array(token_ids, np.int64),
        )

    def prepare(self, tokens: StepTokens) -> tuple[torch.Tensor, torch.Tensor, Context]:
        """The tensors of a step: token ids and positions, `[num_tokens]` each, and what attention must know."""
        positions, context_lens = tokens.positions, tokens.context_lens
        block_tables = self.block_tables[tokens.rows, : -(-context_lens.max() // self.block_size)]
        blocks = block_tables[tokens.owner, positions // self.block_size].astype(np.int64)  # [num_tokens]
        slots = blocks * self.block_size + positions % self.block_size  # [num_tokens]: where each one's K/V will lie
        context = Context(
            block_size=self.block_size,
            num_decodes=int((tokens.num_new == 1).sum()),
            query_start=self.to_device(np.concatenate([[0], tokens.ends]).astype(np.int32)),
            context_lens=self.to_device(context_lens.astype(np.int32)),
            block_tables=self.to_device(block_tables),  # [num_seqs, max_blocks]
            slot_mapping=self.to_device(slots),
        )
        return self.to_device(tokens.input_ids), self.to_device(positions), context

    def fill_row(self, seq: Sequence) -> None:
        """A sequence was admitted: write its sampling settings, and forget the block table of who had the row before."""
        row, params = seq.row, seq.params
        assert params.seed is not None  # the engine has drawn one for a request that gave none
        self.num_copied_blocks[row] = 0
        self.temperature[row], self.top_k[row] = params.temperature, params.top_k
        self.top_p[row], self.min_p[row], self.seed[row] = params.top_p, params.min_p, params.seed
        self.truncates[row] = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)

    def sample(self, batch: Batch, last: np.ndarray, hidden_states: torch.Tensor) -> LaunchedStep:
        """Choose the next token of each sequence that samples. `last` says where each one's last token stands."""
        seqs = [s.seq for s in batch.scheduled if s.samples]
        if not seqs:  # all are in the middle of a long prompt
            return LaunchedStep(torch.empty(0, dtype=torch.int64), {})
        at = last[[s.samples for s in batch.scheduled]]  # [num_sampled]
        rows = np.array([seq.row for seq in seqs])
        positions = np.array([seq.num_tokens - 1 for seq in seqs])  # where the new token will stand
        is_simple = not self.truncates[rows].any() and all(seq.params.logprobs is None for seq in seqs)
        if is_simple and self.graphs is not None and self.graphs.samples_at_once(len(at)):
            keys = random_bits(self.seed[rows], positions).view(np.int64)
            return LaunchedStep(self.graphs.sample(hidden_states, at, rows, keys), {})

        logits = self.model.compute_logits(hidden_states[self.to_device(at)])  # type: ignore[operator]  # [num_sampled, vocab_size]
        token_ids = self.choose(logits, rows, positions)
        if self.graphs is not None:
            self.graphs.remember(self.to_device(rows), token_ids)
        logprobs = {}
        for i, seq in enumerate(seqs):
            if seq.params.logprobs is not None:
                chosen, best_ids, best = top_logprobs(logits[i : i + 1], token_ids[i : i + 1], seq.params.logprobs)
                logprobs[seq.id] = dict(zip(best_ids[0].tolist(), best[0].tolist()))
                logprobs[seq.id].setdefault(int(token_ids[i]), chosen.item())
        return LaunchedStep(token_ids, logprobs)

    def choose(self, logits: torch.Tensor, rows: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """A token for each row of the logits, by the settings in `rows` of the tables: `[num_sampled]` int64.

        On a GPU the one kernel that reads the logits once takes all rows that it can, whoever else is in the batch, so
        that a request's random numbers are the same in every batch.
        """
        uniform = uniform_numbers(self.seed[rows], positions)
        if not self.has_sampling_kernel:
            return sample(logits, SamplingBatch.from_host(*self.settings(rows), uniform, self.device))
        from nanovllm.kernels import triton_sampler

        keys = self.to_device(random_bits(self.seed[rows], positions).view(np.int64))
        token_ids = triton_sampler.sample(logits, self.to_device(self.temperature[rows]), keys)
        (others,) = self.truncates[rows].nonzero()
        if len(others):
            at, rows = self.to_device(others), rows[others]
            few = SamplingBatch.from_host(*self.settings(rows), uniform[others], self.device)
            token_ids[at] = sample(logits[at], few)
        return token_ids

    def settings(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Temperature, top-k, top-p and min-p of some rows."""
        return self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows]

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def resolve_device(name: str) -> torch.device:
    """The device that a name such as "auto", "cpu" or "cuda:1" means. ValueError if this computer does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not one that torch knows; use 'auto', 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; use 'auto', 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no CUDA GPU here; use device='cpu'")
    return device


def resolve_dtype(name: str, hf_config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype that a name means; "auto" is what the device computes best and the checkpoint can stand."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    if torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16  # no bfloat16 arithmetic before Ampere
    return hf_config.torch_dtype or torch.float32
