"""The engine: takes requests in, makes steps, gives answers out."""

import logging
import secrets
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.model_runner import dtype_name
from nanovllm.engine.overlap import Overlap
from nanovllm.engine.parallel import make_runner
from nanovllm.engine.recorder import Recorder, environment
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.trace import Trace
from nanovllm.models import get_model_class
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.checkpoint import load_eos_token_ids, load_hf_config, load_tokenizer
from nanovllm.utils.checks import check_int, check_text
from nanovllm.utils.hub import resolve_model
from nanovllm.utils.interrupts import interrupts_deferred, signals_deferred, uninterrupted

logger = logging.getLogger(__name__)


class Request:
    """A sequence, and what its user gets to see of it."""

    __slots__ = ("prompt", "seq", "detokenizer", "logprobs")

    def __init__(self, prompt: str | None, seq: Sequence, detokenizer: Detokenizer | None) -> None:
        self.prompt = prompt  # None: it was given as token ids
        self.seq = seq
        self.detokenizer = detokenizer
        self.logprobs: list[dict[int, float]] | None = None if seq.params.logprobs is None else []

    @property
    def text(self) -> str:
        return self.detokenizer.text if self.detokenizer is not None else ""

    def output(self) -> dict[str, Any]:
        """The answer as users get it; `token_ids` and `text` grow until `finish_reason` is no longer None."""
        return {
            "request_id": self.seq.id,
            "text": self.text,
            "token_ids": self.seq.output_token_ids,
            "finish_reason": self.seq.finish_reason,
            "num_cached_tokens": self.seq.num_cached_tokens or 0,
            "logprobs": self.logprobs,
        }


class LLMEngine:
    """The parts of the engine, and the loop that drives them.

    Args:
        config: the settings. What is left open in it is filled in here.

    Raises:
        ModelUnavailableError: the model was not found, or could not be downloaded.
        ValueError: the model is not supported, its files are broken, or sizes do not fit.
    """

    def __init__(self, config: Config) -> None:
        path = resolve_model(None if config.model is None else str(config.model))
        hf_config = load_hf_config(path)
        get_model_class(hf_config)  # refuses an unsupported model before anything large is loaded
        longest = hf_config.max_position_embeddings
        if config.max_model_len is not None and config.max_model_len > longest:
            raise ValueError(f"max_model_len is {config.max_model_len}, but the model's positions end at {longest}")

        self.config = config
        self.vocab_size = hf_config.vocab_size
        self.eos_token_ids = load_eos_token_ids(path, hf_config)
        self.tokenizer = load_tokenizer(path)
        self.model_runner = make_runner(config, hf_config, path)
        config.num_kv_blocks = self.model_runner.num_blocks
        if config.max_model_len is None:
            config.max_model_len = min(longest, config.num_kv_blocks * config.block_size)
        self.block_manager = BlockManager(config.num_kv_blocks, config.block_size, config.enable_prefix_caching)
        try:
            self.scheduler = (config.scheduler or Scheduler)(config, self.block_manager)
        except BaseException:  # ranks would live for as long as somebody holds the error, as a notebook does
            self.model_runner.close()
            raise
        self.requests: dict[int, Request] = {}  # those that are not finished
        self.finished: list[Request] = []  # those that are, and that nobody has been told of yet
        self.recorders: list[Recorder] = []  # one for each open trace
        self.is_stepping = False
        self.abandoned: list[Request] = []  # see `abandon`
        self.num_steps = 0
        self.overlap = Overlap(self) if self.model_runner.can_overlap else None
        self._ids = count()

    # -- Requests ------------------------------------------------------------------------------------------------------

    def make_request(self, prompt: str | SequenceOf[int], params: SamplingParams | None = None) -> Request:
        """Check a request and prepare it, not yet queue it. TypeError or ValueError say what is wrong with it."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be a SamplingParams, not {type(params).__name__}")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this model's folder has no tokenizer; give the prompt as token ids")
            token_ids = self.tokenizer.encode(check_text("the prompt", prompt))
        elif isinstance(prompt, (list, tuple)):
            token_ids = list(prompt)
        else:
            raise TypeError(f"a prompt must be a string or a list of token ids, not {type(prompt).__name__}")
        # Three looks at all ids take a ninth of a look at each one, which only tells which is wrong, and how. (Some
        # tokenizers know more tokens than their model.)
        if set(map(type, token_ids)) != {int} or min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            name = "token {} of the prompt" if isinstance(prompt, str) else "prompt[{}]"
            token_ids = [self._check_token_id(name.format(i), token_id) for i, token_id in enumerate(token_ids)]
        for token_id in params.stop_token_ids:
            self._check_token_id("stop_token_ids", token_id)
        if params.stop and self.tokenizer is None:
            raise ValueError(
                "this model's folder has no tokenizer, so stop strings cannot be found; use stop_token_ids"
            )

        max_model_len = self.config.max_model_len
        assert max_model_len is not None
        if not token_ids:
            raise ValueError("the prompt is empty; give at least one token")
        if len(token_ids) >= max_model_len:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, but max_model_len is {max_model_len} for prompt and answer "
                f"together (the KV cache holds {self.config.num_kv_blocks} blocks of {self.config.block_size} tokens); "
                "shorten the prompt, or raise max_model_len, num_kv_blocks or kv_cache_memory"
            )
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        answer_len = max_model_len if params.max_tokens is None else params.max_tokens
        stop_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_token_ids |= self.eos_token_ids
        seq = Sequence(
            next(self._ids), token_ids, params, min(len(token_ids) + answer_len, max_model_len), stop_token_ids
        )
        detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer, params.stop or ())
        return Request(prompt if isinstance(prompt, str) else None, seq, detokenizer)

    def _check_token_id(self, name: str, token_id: Any) -> int:
        hint = f"the vocabulary has {self.vocab_size} tokens"
        return check_int(name, token_id, at_most=self.vocab_size - 1, hint=hint)

    def enqueue(self, request: Request) -> int:
        """Queue a request that `make_request` made; returns its id."""
        with uninterrupted():
            self.scheduler.add(request.seq)
            self.requests[request.seq.id] = request
            for recorder in self.recorders:
                recorder.add(request.seq, request.prompt)
        return request.seq.id

    def abort(self, request_id: int) -> dict[str, Any]:
        """End a request now; returns what it has got so far. KeyError if no unfinished request has this id."""
        if request_id not in self.requests:
            raise KeyError(f"no unfinished request has the id {request_id!r}")
        with uninterrupted():
            request = self.requests.pop(request_id)
            self.scheduler.finish(request.seq, "abort")
            self._record(finished=[request.seq])
        return request.output()

    def abandon(self, requests: list[Request]) -> None:
        """Nobody waits for these any more: abort them, and forget the answers of those that are finished.

        Python's garbage collector may end a stream anywhere, in the midst of a step, too. Then the step goes first.
        """
        if self.is_stepping:
            self.abandoned += requests
            return
        with uninterrupted():
            self.finished = [request for request in self.finished if request not in requests]
            for request in requests:
                if request.seq.id in self.requests:
                    self.abort(request.seq.id)

    def reset_prefix_cache(self) -> None:
        """Forget what the prefix cache holds: all blocks are as new. RuntimeError while requests are unfinished."""
        if self.requests:
            raise RuntimeError(f"{len(self.requests)} requests are unfinished; finish or abort them first")
        self.block_manager.clear()
        self._record()

    def close(self) -> None:
        """End the processes and the traces that this engine has started; it can make no more steps. Twice is fine."""
        for recorder in list(self.recorders):
            recorder.trace.close()
        self.model_runner.close()

    # -- Steps ---------------------------------------------------------------------------------------------------------

    def step(self) -> tuple[Batch, list[Request]]:
        """Make one step for all requests that can take part in it; returns its batch and the requests it finished.

        If it fails, it raises; all sequences that run go back to the queue, as if it had never been.
        """
        with self._stepping():
            start, batch, is_complete = perf_counter(), Batch(), False
            try:
                batch = self.schedule()
                scheduled = perf_counter()
                if not batch.scheduled:
                    if batch.preempted:
                        self._record(batch)
                    return batch, []
                launched = self.model_runner.launch(batch)
                token_ids, logprobs = launched.tokens(), launched.logprobs
                computed = perf_counter()
                with signals_deferred():
                    self.scheduler.update(batch, token_ids)
                    finished = self._show(batch, logprobs)
                    end = perf_counter()
                    wait = computed - scheduled - sum(launched.times.values())  # for the GPU, or for ranks
                    times = {"schedule": scheduled - start, **launched.times, "wait": wait, "update": end - computed}
                    self._record(batch, [request.seq for request in finished], times, launched.graph)
                    self._log(batch, end - start)
                    is_complete = True
            except BaseException as error:  # a signal's handler may raise anything, and after all is done, too
                if not is_complete:
                    self.scheduler.fail(batch)
                    self._record(batch, error=error)
                raise
        return batch, self.take_finished()  # not before: Ctrl-C, if it came, is raised at the end of the block

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Ctrl-C, and who abandons a request, wait for the end of the block."""
        with interrupts_deferred():
            self.is_stepping = True
            try:
                yield
            finally:
                self.is_stepping = False
                if self.abandoned:
                    abandoned, self.abandoned = self.abandoned, []
                    self.abandon(abandoned)

    def schedule(self, is_in_flight: bool = False) -> Batch:
        """Plan a step. RuntimeError if it would never get further: nothing planned, and nothing in flight."""
        with signals_deferred():
            batch = self.scheduler.schedule()
        if self.requests and not (batch.scheduled or batch.preempted or is_in_flight):
            raise RuntimeError(f"{type(self.scheduler).__name__} scheduled nothing, although requests wait")
        return batch

    def advance(self) -> tuple[Batch, list[Request]]:
        """A step for whoever wants answers: like `step`, but on a GPU, if nobody records, overlapped with the next."""
        if self.overlap is not None and not self.recorders:
            with self._stepping():
                batch = self.overlap.step()
            return batch, self.take_finished()
        return self.step()

    def settle(self) -> list[Request]:
        """Wait for steps that overlap, before anything else is done; returns the requests that they finished."""
        if self.overlap is not None:
            with self._stepping():
                self.overlap.drain()
        return self.take_finished()

    def take_finished(self) -> list[Request]:
        """The requests that have finished since this was last asked. An interrupted step's are told of by the next."""
        finished, self.finished = self.finished, []
        return finished

    def _show(self, batch: Batch, logprobs: dict[int, dict[int, float]]) -> list[Request]:
        """Turn a step's tokens into text, find stop strings, and take finished requests off the list."""
        finished = []
        for i, seq in enumerate(scheduled.seq for scheduled in batch.scheduled if scheduled.samples):
            request = self.requests.get(seq.id)
            if request is None:
                continue  # finished or aborted while this step was in flight
            if seq.finish_reason == "abort":
                logger.error("request %d is aborted: the model's logits for it are NaN or infinite", seq.id)
            else:
                if request.logprobs is not None:
                    request.logprobs.append(logprobs[i])
                try:
                    self._detokenize(request)
                except BaseException:  # the tokenizer's; if it panics in Rust, that is no Exception
                    logger.exception("request %d is aborted: the tokenizer cannot decode its answer", seq.id)
                    self._end(seq, "abort")
            if seq.is_finished:
                finished.append(self.requests.pop(seq.id))
        self.finished += finished
        return finished

    def _detokenize(self, request: Request) -> None:
        seq, detokenizer = request.seq, request.detokenizer
        if detokenizer is None:
            return
        if seq.finish_reason != "stop":  # the token that ends an answer is not part of its text
            detokenizer.append(seq.token_ids[-1:])
        if seq.is_finished:
            detokenizer.finish()
        if detokenizer.stopped:
            self._end(seq, "stop")

    def _end(self, seq: Sequence, reason: str) -> None:
        """End a sequence for a reason that its text gives, whatever reason the scheduler has found already."""
        if not seq.is_finished:
            self.scheduler.finish(seq, reason)
        seq.finish_reason = reason

    # -- What is told about them ---------------------------------------------------------------------------------------

    def trace(self) -> Trace:
        """Start to record: see `LLM.trace`."""
        if not self.recorders:
            self.block_manager.events = []
        runner = self.model_runner
        about = environment(torch=torch.__version__, device=runner.device_name, dtype=dtype_name(runner.dtype))
        text_of = partial(token_text, self.tokenizer)  # not the engine's: a trace that is kept must not keep the engine
        recorder = Recorder(self.config, about, self.block_manager, self.scheduler, text_of, self._stop_recording)
        for request in self.requests.values():
            recorder.add(request.seq, request.prompt)
        self.recorders.append(recorder)
        return recorder.trace

    def _stop_recording(self, recorder: Recorder) -> None:
        self.recorders.remove(recorder)
        if not self.recorders:
            self.block_manager.events = None

    def _record(self, *what: Any, **more: Any) -> None:
        """Tell all open traces what happened, and of the blocks that it changed."""
        if self.recorders:
            assert self.block_manager.events is not None
            events, self.block_manager.events = self.block_manager.events, []
            for recorder in self.recorders:
                recorder.record(events, *what, **more)

    def _log(self, batch: Batch, seconds: float) -> None:
        self.num_steps += 1
        if logger.isEnabledFor(logging.DEBUG):
            scheduler, blocks = self.scheduler, self.block_manager
            logger.debug(
                "step %d: %d tokens of %d sequences, %d admitted, %d preempted, %d running, %d waiting, "
                "%d of %d blocks in use, %.1f ms",
                *(self.num_steps, batch.num_tokens, len(batch.scheduled), len(batch.admitted), len(batch.preempted)),
                *(len(scheduler.running), len(scheduler.waiting), blocks.num_blocks - len(blocks.free)),
                *(blocks.num_blocks, 1000 * seconds),
            )


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token on its own, as text; its id where there is no tokenizer."""
    return f"<{token_id}>" if tokenizer is None else str(tokenizer.decode([token_id]))
