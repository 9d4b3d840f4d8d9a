"""The model runner: a scheduled batch becomes tensors, the tensors become logits, the logits become tokens."""

import logging
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from nanovllm.config import Config
from nanovllm.engine.buckets import bucket_of, takes_pieces
from nanovllm.engine.cuda_graphs import StepGraphs, copied
from nanovllm.engine.kv_cache import MemoryUse, block_bytes, free_memory, size_kv_cache
from nanovllm.engine.launched_step import LaunchedStep, Likeliest
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.step_inputs import InputCollector, StepInputs
from nanovllm.kernels import fused_layers, get_backend, torch_attention
from nanovllm.kernels.check import choose_backend
from nanovllm.layers.attention import Attention
from nanovllm.layers.sampler import (
    ROWS_AT_A_TIME,
    SamplingBatch,
    random_bits,
    sample,
    top_logprobs,
    uniform_numbers,
)
from nanovllm.utils.context import Context, use_context
from nanovllm.utils.loader import build_model, pieces_of
from nanovllm.utils.ranks import Ranks

logger = logging.getLogger(__name__)

NO_LOGPROBS = -1  # in the place of how many a request wants


def on_its_gpu(method: Callable[..., Any]) -> Callable[..., Any]:
    """Triton, CUDA graphs and events take torch's *current* GPU: while `method` runs, that is the one of its runner."""

    @wraps(method)
    def call(self: "ModelRunner", *args: Any) -> Any:
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):  # -1 changes nothing
            return method(self, *args)

    return call


class ModelRunner:
    """Owns the model and its KV cache, or one rank's part of them, and runs batches on them.

    Sequences that run have a row each in tables of what changes rarely: their block tables and sampling settings. So a
    step copies only what is new, and gathers the rest by row, for all sequences at once.
    """

    def __init__(self, config: Config, hf_config: PretrainedConfig, path: Path, ranks: Ranks | None = None) -> None:
        self.hf_config, self.ranks = hf_config, ranks or Ranks()
        self.device = resolve_device(config.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.stepping = threading.RLock()  # held to launch a step, and to close, which another thread may do
        try:
            self.build(config, path)
        except BaseException as error:
            self.close()
            forget_locals(error)
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise ValueError(
                    f"{self.device} has too little memory for the weights, a step of {config.max_num_batched_tokens} "
                    "tokens and CUDA graphs; lower max_num_batched_tokens, max_num_seqs or kv_cache_memory, set "
                    f"enforce_eager=True, or share the model with tensor_parallel_size ({error})"
                ) from error
            raise

    @on_its_gpu
    def build(self, config: Config, path: Path) -> None:
        """The model, the KV cache in what memory is left, and the CUDA graphs."""
        hf_config = self.hf_config
        self.device_name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self.dtype = resolve_dtype(config.dtype, hf_config, self.device)
        self.block_size = config.block_size
        if config.attention_backend != "auto":  # one that cannot run here is refused before the weights are read
            get_backend(config.attention_backend, self.device, self.dtype, self.block_size)
        self.model = build_model(hf_config, path, self.dtype, self.device, config.load_format, self.ranks)
        self.collector = InputCollector(config.max_num_seqs)

        # A row for each sequence that runs.
        num_rows = config.max_num_seqs
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int64)
        self.top_p = np.zeros(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.seed = np.zeros(num_rows, np.int64)
        self.truncates = np.zeros(num_rows, bool)  # draws at random, from fewer tokens than all
        self.num_logprobs = np.full(num_rows, NO_LOGPROBS)

        attention = [module for module in self.model.modules() if isinstance(module, Attention)]
        heads = (attention[0].num_heads, attention[0].num_kv_heads, attention[0].head_dim)
        backend = choose_backend(config.attention_backend, *heads, config.block_size, self.dtype, self.device)
        # Where Triton works.
        self.has_sampling_kernel = self.device.type == "cuda" and fused_layers(self.dtype) is not None
        # The torch backend plans with numbers that it reads back from the GPU, which a graph cannot.
        has_graphs = self.has_sampling_kernel and backend is not torch_attention and not config.enforce_eager
        # All ranks or none: they talk inside of graphs.
        has_graphs = bool(self.ranks.smallest(int(has_graphs), self.device))

        shape = (config.block_size, *heads[1:])
        self.bytes_per_block = block_bytes(len(attention), *shape, self.dtype)
        longest = config.max_model_len or hf_config.max_position_embeddings
        max_num_blocks = -(-longest // config.block_size)
        self.num_blocks = 0  # until it is known how much memory is left for them
        self.memory = MemoryUse()
        if self.device.type == "cuda":
            self.memory.weights = sum(parameter.nbytes for parameter in self.model.parameters())
            self.bind(attention, backend, backend.allocate(len(attention), 0, *shape, self.dtype, self.device))
            self.profile(config, max_num_blocks, has_graphs)
        num_blocks = size_kv_cache(config, self.bytes_per_block, self.device, self.memory.reserved)
        self.num_blocks = self.ranks.smallest(num_blocks, self.device)  # one table of blocks for all of them
        self.kv_cache = backend.allocate(len(attention), self.num_blocks, *shape, self.dtype, self.device)
        self.memory.kv_cache = self.kv_cache.nbytes
        self.bind(attention, backend, self.kv_cache)

        # None of those that run can be longer than the cache, so neither need its block table be.
        max_num_blocks = min(max_num_blocks, self.num_blocks)
        self.block_tables = np.zeros((num_rows, max_num_blocks), np.int32)
        self.graphs = self.capture_graphs(config, max_num_blocks) if has_graphs else None
        # With them a step is launched in less time than it takes, and finds on the GPU what the one before it sampled.
        self.can_overlap = self.graphs is not None
        if self.device.type == "cuda":
            logger.info(self.what_it_took())

    def what_it_took(self) -> str:
        """A line about memory, and the time for CUDA graphs."""
        if self.graphs is None:
            return f"memory: {self.memory}"
        captured = f"{self.graphs.num_sizes} sizes captured in {self.graphs.seconds:.1f} s"
        return f"memory: {self.memory}; CUDA graphs for {captured}"

    def bind(self, attention: list[Attention], backend: ModuleType, kv_cache: torch.Tensor) -> None:
        for layer, (k_cache, v_cache) in zip(attention, kv_cache.transpose(0, 1), strict=True):
            layer.bind(backend, k_cache, v_cache)

    def profile(self, config: Config, max_num_blocks: int, has_graphs: bool) -> None:
        """Try the largest step and the largest graphs, to know what to leave free for them beside the KV cache."""
        most = config.max_num_batched_tokens
        self.memory.step = self.peak_of_step(most, min(config.max_num_seqs, most), max_num_blocks)
        self.memory.reserved = self.memory.step
        if has_graphs:
            trial = self.capture_graphs(config, max_num_blocks, is_trial=True)
            self.memory.reserved += self.memory.graphs + trial.bytes_kept_by_cuda(self.ranks.size)

    @torch.inference_mode()
    def peak_of_step(self, num_tokens: int, num_seqs: int, max_num_blocks: int) -> int:
        """Bytes that torch takes from the GPU, at most, for what a step of so many tokens has in between.

        They are one sequence's, and then `num_seqs` sequences', of which all but the last decode, with block tables for
        the longest context. Keys and values go to the dummy block, the only one that there is so far.
        """
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        width = max(max_num_blocks, -(-num_tokens // self.block_size))
        positions = torch.arange(num_tokens, device=self.device)
        for num_decodes in (0, num_seqs - 1):
            lens = np.array([1] * num_decodes + [num_tokens - num_decodes], np.int32)
            context = Context(
                block_size=self.block_size,
                num_decodes=num_decodes,
                query_start=self.to_device(np.concatenate([[0], lens.cumsum()]).astype(np.int32)),
                context_lens=self.to_device(lens),
                block_tables=torch.zeros(len(lens), width, dtype=torch.int32, device=self.device),
                slot_mapping=torch.zeros(num_tokens, dtype=torch.int64, device=self.device),
            )
            with use_context(context):
                hidden_states = self.model(torch.zeros_like(positions), positions)
        # Sampled in the way that takes most: at random, from a nucleus so wide that all tokens must be sorted.
        rows = np.zeros(num_seqs, np.int64)
        self.temperature[0], self.top_p[0], self.truncates[0] = 1e6, 0.999, True
        self.choose(self.model.compute_logits(hidden_states[:num_seqs]), rows, rows)  # type: ignore[operator]
        self.temperature[0], self.top_p[0], self.truncates[0] = 0, 0, False
        return torch.cuda.max_memory_reserved(self.device) - before

    def capture_graphs(self, config: Config, max_num_blocks: int, is_trial: bool = False) -> StepGraphs:
        """Graphs of all sizes, for the KV cache that there is; while it has only the dummy block, a trial."""
        free = free_memory(self.device)
        graphs = StepGraphs(
            self.model,
            self.block_size,
            self.num_blocks,
            num_rows=config.max_num_seqs,
            max_num_blocks=max_num_blocks,
            max_num_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            hidden_size=self.hf_config.hidden_size,
            dtype=self.dtype,
            device=self.device,
            is_trial=is_trial,
        )
        self.memory.graphs = free - free_memory(self.device)
        return graphs

    def launch(self, batch: Batch) -> LaunchedStep:
        """Start a step: compute all its tokens, and sample for each sequence whose last token is among them."""
        start = perf_counter()
        inputs = self.collector.collect(batch)
        collected = perf_counter()
        with self.stepping:
            if self.is_closed:
                raise RuntimeError("this engine has been closed; make a new LLM")
            launched = self.run(inputs)
        launched.times["prepare"] += collected - start
        return launched

    @on_its_gpu
    @torch.inference_mode()
    def run(self, inputs: StepInputs) -> LaunchedStep:
        """`launch`, once the batch has become numbers. Every rank makes the same call."""
        start = perf_counter()
        self.update_tables(inputs)
        num_tokens = len(inputs.input_ids)
        in_pieces = self.graphs is not None and takes_pieces(num_tokens, inputs.chunks)
        bucket = None if self.graphs is None else bucket_of(num_tokens, in_pieces)
        rows = inputs.rows[inputs.owner]  # [num_tokens]
        if self.graphs is None or bucket is None:
            context = self.prepare(inputs, self.to_device(self.slots_of(inputs.positions, rows)))
            input_ids, positions = self.to_device(inputs.input_ids), self.to_device(inputs.positions)
            if self.graphs is not None:
                input_ids = self.graphs.known(input_ids, self.to_device(rows))
            prepared = perf_counter()
            with use_context(context):
                hidden_states = self.model(input_ids, positions)  # [num_tokens, hidden_size]
        elif not in_pieces:
            prepared = perf_counter()
            hidden_states = self.graphs.replay(bucket, inputs.input_ids, inputs.positions, rows)
        else:
            prepared = perf_counter()
            prepare = partial(self.prepare, inputs)
            hidden_states = self.graphs.piecewise.replay(bucket, inputs.input_ids, inputs.positions, rows, prepare)
        computed = perf_counter()
        launched = self.sample(inputs, hidden_states)
        sampled = perf_counter()
        launched.times = {"prepare": prepared - start, "forward": computed - prepared, "sample": sampled - computed}
        if bucket is not None:
            launched.graph = {"bucket": bucket, "padding": bucket - num_tokens, "in_pieces": in_pieces}
        return launched

    def update_tables(self, inputs: StepInputs) -> None:
        """Write down the sampling settings of those admitted, and the blocks that block tables have grown by."""
        for row, params in inputs.admitted:
            assert params.seed is not None  # the engine has drawn one for a request that gave none
            self.temperature[row], self.top_k[row] = params.temperature, params.top_k
            self.top_p[row], self.min_p[row], self.seed[row] = params.top_p, params.min_p, params.seed
            self.truncates[row] = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
            self.num_logprobs[row] = NO_LOGPROBS if params.logprobs is None else params.logprobs
        rows, places, blocks = inputs.new_blocks
        self.block_tables[rows, places] = blocks
        if self.graphs is not None and len(blocks):
            self.graphs.add_blocks(rows, places, blocks)

    def prepare(self, inputs: StepInputs, slot_mapping: torch.Tensor | None = None) -> Context:
        """What attention must know, as tensors. It stores keys and values only if it is told where."""
        num_blocks = -(-inputs.context_lens.max() // self.block_size)  # of the longest
        return Context(
            block_size=self.block_size,
            num_decodes=int((inputs.num_new == 1).sum()),
            query_start=self.to_device(np.concatenate([[0], inputs.ends]).astype(np.int32)),
            context_lens=self.to_device(inputs.context_lens.astype(np.int32)),
            block_tables=self.to_device(self.block_tables[inputs.rows, :num_blocks]),
            slot_mapping=slot_mapping,
        )

    def slots_of(self, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Where keys and values of some tokens go, `[num_tokens]`. Graphs work it out on the GPU."""
        blocks = self.block_tables[rows, positions // self.block_size].astype(np.int64)
        return blocks * self.block_size + positions % self.block_size

    def sample(self, inputs: StepInputs, hidden_states: torch.Tensor) -> LaunchedStep:
        """Choose the next token of each sequence that samples."""
        rows = inputs.rows[inputs.samples]  # [num_sampled]
        if not len(rows):  # all are in the middle of a long prompt
            return LaunchedStep(torch.empty(0, dtype=torch.int64))
        last = inputs.ends[inputs.samples] - 1  # [num_sampled]: where each one's last token stands in the batch
        positions = inputs.context_lens[inputs.samples]  # where the new token will stand in its sequence
        (want_logprobs,) = (self.num_logprobs[rows] != NO_LOGPROBS).nonzero()
        is_simple = not self.truncates[rows].any() and not len(want_logprobs)
        if is_simple and self.graphs is not None and self.graphs.samples_at_once(len(rows)):
            bits = random_bits(self.seed[rows], positions).view(np.int64)
            return LaunchedStep(self.graphs.sample(hidden_states, last, rows, bits, self.temperature[rows]))

        hidden_states = hidden_states[self.to_device(last)]
        logits = self.model.compute_logits(hidden_states)  # type: ignore[operator]  # [num_sampled, vocab_size]
        token_ids = self.choose(logits, rows, positions)
        if self.graphs is not None:
            self.graphs.remember(self.to_device(rows), token_ids)
        num_rows = ROWS_AT_A_TIME[self.device.type]
        parts = [want_logprobs[i : i + num_rows] for i in range(0, len(want_logprobs), num_rows)]
        return LaunchedStep(token_ids, [self.likeliest(logits, token_ids, part, rows[part]) for part in parts])

    def likeliest(
        self, logits: torch.Tensor, token_ids: torch.Tensor, places: np.ndarray, rows: np.ndarray
    ) -> Likeliest:
        """The log-probabilities that the requests in some places of the step want; `rows` are theirs in the tables."""
        at, n_best = self.to_device(places), self.num_logprobs[rows]
        return Likeliest(places, n_best, top_logprobs(logits[at], token_ids[at], int(n_best.max())))

    def choose(self, logits: torch.Tensor, rows: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """A token for each row of the logits, by the settings in `rows` of the tables: `[num_sampled]` int64.

        On a GPU the kernel that reads the logits once takes all rows that it can, whoever else is in the batch: its
        sums are rounded otherwise than those of `sample`, and a request must get the same token in every batch.
        """
        if not self.has_sampling_kernel:
            return sample(logits, self.sampling_batch(rows, positions))
        from nanovllm.kernels import triton_sampler

        bits = self.to_device(random_bits(self.seed[rows], positions).view(np.int64))
        token_ids = triton_sampler.sample(logits, self.to_device(self.temperature[rows]), bits)
        (others,) = self.truncates[rows].nonzero()
        if len(others):
            at = self.to_device(others)
            token_ids[at] = sample(logits[at], self.sampling_batch(rows[others], positions[others]))
        return token_ids

    def sampling_batch(self, rows: np.ndarray, positions: np.ndarray) -> SamplingBatch:
        """How some rows are sampled, and the random numbers of their new tokens."""
        settings = (self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows])
        return SamplingBatch.from_host(*settings, uniform_numbers(self.seed[rows], positions), self.to_device)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return copied(array, self.device) if self.device.type == "cuda" else torch.from_numpy(array)

    # -- What it holds -------------------------------------------------------------------------------------------------

    def describe(self) -> list[dict[str, Any]]:
        """What each rank holds and has exchanged so far; here there is one. `docs/distributed.md` has the keys."""
        tensors = [
            {"name": piece.name, "shape": piece.shape, "part": [[part.start, part.stop] for part in piece.part]}
            for piece in pieces_of(self.hf_config, self.ranks)
        ]
        return [
            {
                "rank": self.ranks.rank,
                "device": str(self.device),
                "tensors": tensors,
                "kv_cache": list(self.kv_cache.shape),
                "traffic": {name: asdict(traffic) for name, traffic in self.ranks.traffic.items()},
            }
        ]

    @property
    def is_closed(self) -> bool:
        return not hasattr(self, "model")

    def close(self) -> None:
        """Let go of all that is large, whoever still holds this runner; what is being launched goes out first."""
        with self.stepping:
            for name in ("model", "kv_cache", "graphs"):
                vars(self).pop(name, None)


def forget_locals(error: BaseException) -> None:
    """A notebook keeps the last error, and an error the frames that it has passed, with all that they held on a GPU."""
    passed: BaseException | None = error
    while passed is not None:
        traceback.clear_frames(passed.__traceback__)
        passed = passed.__cause__ or passed.__context__


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
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but the last GPU here is 'cuda:{torch.cuda.device_count() - 1}'")
    return device


def dtype_name(dtype: torch.dtype) -> str:
    """As `resolve_dtype` understands it."""
    return str(dtype).removeprefix("torch.")


def resolve_dtype(name: str, hf_config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype that a name means; "auto" is what the device computes best and the checkpoint can stand."""
    has_bfloat16 = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "bfloat16" and not has_bfloat16:
        raise ValueError("dtype='bfloat16' needs a GPU of compute capability 8.0 (Ampere) or more; use 'float16'")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return hf_config.torch_dtype or torch.float32 if has_bfloat16 else torch.float16
