"""The recorder: watches an engine and writes down in a `Trace` what it does."""

import platform
from collections.abc import Callable
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import nanovllm
from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.trace import EventRow, Pool, Step, Trace, TracedRequest


class Recorder:
    """Writes a `Trace`. The engine calls it after every step, and when something happens between two."""

    def __init__(
        self,
        config: Config,
        environment: dict[str, str],
        block_manager: BlockManager,
        scheduler: Scheduler,
        text_of: Callable[[int], str],
        on_close: Callable[["Recorder"], None],
    ) -> None:
        self.scheduler = scheduler
        pool = look_at(block_manager, scheduler.running)
        self.trace = Trace(describe(config), environment, pool, text_of, lambda: on_close(self))

    def add(self, seq: Sequence, prompt: str | None) -> None:
        """A request is queued, or was when the trace was opened."""
        self.trace.requests[seq.id] = TracedRequest(
            id=seq.id,
            arrival=len(self.trace.steps),
            prompt=prompt,
            prompt_token_ids=seq.prompt_token_ids,
            output_token_ids=seq.output_token_ids,
            num_computed_tokens=seq.num_computed_tokens,
        )

    def record(
        self,
        events: list[EventRow],
        batch: Batch | None = None,
        finished: list[Sequence] | None = None,
        times: dict[str, float] | None = None,
        graph: dict[str, int] | None = None,
        error: BaseException | None = None,
    ) -> None:
        """A step is done or has failed, or, without a batch, something happened between two."""
        trace, batch, finished = self.trace, batch or Batch(), finished or []
        sampled = {}
        for s in batch.scheduled:
            if s.samples and len(s.seq.token_ids) > s.num_computed_tokens + s.num_new_tokens and not error:
                sampled[s.seq.id] = s.seq.token_ids[-1]  # of NaN it got none
        seconds = sum(times.values()) if times else 0.0
        trace.steps.append(
            Step(
                index=len(trace.steps),
                start=trace.now() - seconds,
                scheduled_rows=[(s.seq.id, s.num_new_tokens, s.num_computed_tokens) for s in batch.scheduled],
                waiting=[seq.id for seq in self.scheduler.waiting],
                preempted=[seq.id for seq in batch.preempted],
                finished=[seq.id for seq in finished],
                event_rows=events,
                sampled=sampled,
                times=times or {},
                graph=graph,
                error=str(error) or type(error).__name__ if error else None,
            )
        )
        for request_id, token_id in sampled.items():
            trace.requests[request_id].output_token_ids.append(token_id)
        for seq in finished:
            trace.requests[seq.id].finish_reason = seq.finish_reason


def look_at(block_manager: BlockManager, running: list[Sequence]) -> Pool:
    """The blocks as they are when a trace is opened."""
    pool = Pool(block_manager.num_blocks)
    pool.hash = [block.hash for block in block_manager.blocks]
    pool.filled = [0 if hash is None else block_manager.block_size for hash in pool.hash]
    pool.free = block_manager.free.copy()
    for seq in running:
        pool.block_tables[seq.id] = tuple(seq.block_table)
        for i, block in enumerate(seq.block_table):
            pool.owners[block] += (seq.id,)
            num_tokens = seq.num_computed_tokens - i * block_manager.block_size
            pool.filled[block] = max(pool.filled[block], min(num_tokens, block_manager.block_size))
    return pool


def describe(config: Config) -> dict[str, Any]:
    """The settings as plain data. Of the model's folder only the name: where it lies is nobody's business."""
    settings = {f.name: getattr(config, f.name) for f in fields(config)}
    settings["model"] = None if config.model is None else Path(config.model).name
    settings["scheduler"] = getattr(config.scheduler, "__name__", None)
    return settings


def environment(**more: str) -> dict[str, str]:
    """Where and when a trace is recorded."""
    return {
        "nanovllm": nanovllm.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    } | more
