"""The trace: what happened in every step, as plain data.

    with llm.trace() as trace:
        llm.generate(prompts)
    trace.steps[3].scheduled    # who ran in step 3, with how many tokens
    trace.blocks_at(3)          # every block of the KV cache after step 3
    trace.save("run.json.gz")

A trace records *changes*: who was scheduled, what happened to which block. The state after any step is computed from
them when it is asked for, so that recording costs little, and a picture can go backwards as easily as forwards.

Saved, a trace is one JSON object; docs/api.md describes it. This file needs no torch, and neither does who reads one.
"""

import gzip
import json
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from nanovllm.engine.chrome_trace import chrome_events

FORMAT, VERSION = "nanovllm trace", 1
KINDS = ("allocate", "fill", "share", "cache", "free", "evict", "clear")
STEPS_PER_KEYFRAME = 32  # the state after every 32nd step is kept, so that no other is far from one


class BlockEvent(NamedTuple):
    """A change to a block of the KV cache.

    allocate: `request` takes the block from the front of the queue of free blocks.
    fill:     `value` tokens of it will be filled once the step is computed.
    share:    `request` finds it in the prefix cache and holds it too: a hit.
    cache:    its content is in the prefix cache from now on, under the hash `value`.
    free:     `request` gives it back. If nobody else holds it, it joins the queue of free blocks.
    evict:    its content leaves the prefix cache.
    clear:    the whole pool is as new (`block` is 0 and says nothing).
    """

    kind: str
    block: int
    request: int | None = None
    value: int | None = None


class BlockState(NamedTuple):
    """A block of the KV cache between two steps."""

    owners: tuple[int, ...]  # ids of the requests that hold it, in the order in which they came to it
    filled: int  # tokens whose keys and values it holds
    ref_count: int
    hash: int | None  # None: the prefix cache does not know it
    free_index: int | None  # its place in the queue of free blocks, 0 is taken next; None: it is held


class Scheduled(NamedTuple):
    """A request's share of a step: `num_new_tokens` tokens, after `num_computed_tokens` that the cache held already."""

    id: int
    num_new_tokens: int
    num_computed_tokens: int


# What a step keeps of both, for they come by the hundred. Named when they are asked for and not when they are recorded,
# a trace of 64 sequences on a tiny model costs 3 % of a step instead of 6.
EventRow = tuple[str, int, int | None, int | None]
ScheduledRow = tuple[int, int, int]


@dataclass(slots=True)
class Step:
    """One step of the engine, or something that changed blocks between two: an abort, say, which schedules nobody.

    All lists are of request ids. `waiting` are those who wait when the step is planned, `preempted` those who lost
    their blocks in it, `finished` those who ended with it. `sampled` gives the tokens that were added to the answers.
    """

    index: int
    start: float  # seconds since the trace was opened
    scheduled_rows: list[ScheduledRow]
    waiting: list[int]
    preempted: list[int]
    finished: list[int]
    event_rows: list[EventRow]
    sampled: dict[int, int]
    times: dict[str, float]  # seconds for each phase of a step, see docs/api.md; empty between steps
    graph: dict[str, int] | None = None  # {"bucket", "padding", "in_pieces"} if one was replayed
    error: str | None = None  # what made the step fail

    @property
    def scheduled(self) -> list[Scheduled]:
        return [Scheduled(*row) for row in self.scheduled_rows]

    @property
    def block_events(self) -> list[BlockEvent]:
        return [BlockEvent(*row) for row in self.event_rows]

    @property
    def num_tokens(self) -> int:
        return sum(num_new_tokens for _, num_new_tokens, _ in self.scheduled_rows)

    def to_dict(self) -> dict[str, Any]:
        data = attributes(self)
        data["scheduled"] = columns(Scheduled._fields, data.pop("scheduled_rows"))
        data["block_events"] = columns(BlockEvent._fields, data.pop("event_rows"))
        data["sampled"] = columns(("id", "token"), self.sampled.items())
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Step":
        data = data.copy()
        return cls(
            scheduled_rows=rows_of(data.pop("scheduled"), Scheduled._fields),
            event_rows=rows_of(data.pop("block_events"), BlockEvent._fields),
            sampled=dict(rows_of(data.pop("sampled"), ("id", "token"))),
            **data,
        )


def attributes(record: Any) -> dict[str, Any]:
    """A dataclass as a dict. dataclasses.asdict would copy every token id by itself, for seconds."""
    return {f.name: getattr(record, f.name) for f in fields(record)}


def columns(names: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> dict[str, list[Any]]:
    """A table as a list for each column: in a file a third as large, and as quick, as a dict for each row."""
    return dict(zip(names, map(list, zip(*rows)))) or {name: [] for name in names}


def rows_of(table: dict[str, list[Any]], names: tuple[str, ...]) -> list[Any]:
    """The rows of what `columns` made. KeyError if a column is missing."""
    return list(zip(*(table[name] for name in names)))


@dataclass(slots=True)
class TracedRequest:
    """A request that took part. What it had generated before the trace was opened is in `output_token_ids` too."""

    id: int
    arrival: int  # the number of steps that the trace had when it came
    prompt: str | None  # None: it was given as token ids
    prompt_token_ids: list[int]
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    num_computed_tokens: int = 0  # held by the cache when the trace was opened


class Pool:
    """The blocks of the KV cache as the events tell them; the block manager's own notes, kept a second time."""

    def __init__(self, num_blocks: int) -> None:
        self.owners: list[tuple[int, ...]] = [()] * num_blocks
        self.filled = [0] * num_blocks
        self.hash: list[int | None] = [None] * num_blocks
        self.free = OrderedDict[int, None].fromkeys(range(num_blocks))
        self.block_tables: dict[int, tuple[int, ...]] = {}

    def copy(self) -> "Pool":
        copy = Pool.__new__(Pool)
        copy.owners, copy.filled, copy.hash = self.owners.copy(), self.filled.copy(), self.hash.copy()
        copy.free, copy.block_tables = self.free.copy(), self.block_tables.copy()
        return copy

    def apply(self, events: list[EventRow]) -> None:
        for event in events:
            self._apply(*event)

    def _apply(self, kind: str, block: int, request: Any, value: Any) -> None:
        if kind == "fill":
            self.filled[block] = value
        elif kind in ("allocate", "share"):
            self.free.pop(block, None)
            self.owners[block] += (request,)
            self.block_tables[request] = (*self.block_tables.get(request, ()), block)
            if kind == "allocate":
                self.filled[block] = 0
        elif kind == "cache":
            self.hash[block] = value
        elif kind == "evict":
            self.hash[block] = None
            if block in self.free:
                self.filled[block] = 0
                self.free.move_to_end(block, last=False)
        elif kind == "free":
            self.owners[block] = tuple(owner for owner in self.owners[block] if owner != request)
            self.block_tables.pop(request, None)  # all of them go at once
            if not self.owners[block]:
                self.free[block] = None
                if self.hash[block] is None:
                    self.filled[block] = 0
                    self.free.move_to_end(block, last=False)
        elif kind == "clear":
            vars(self).update(vars(Pool(len(self.owners))))

    def to_dict(self) -> dict[str, Any]:
        used = [block for block, owners in enumerate(self.owners) if owners or self.hash[block] is not None]
        return {
            "num_blocks": len(self.owners),
            "blocks": [
                {"block": b, "owners": self.owners[b], "filled": self.filled[b], "hash": self.hash[b]} for b in used
            ],
            "free": list(self.free),
            "block_tables": self.block_tables,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Pool":
        pool = cls(data["num_blocks"])
        for state in data["blocks"]:
            block = state["block"]
            pool.owners[block], pool.filled[block] = tuple(state["owners"]), state["filled"]
            pool.hash[block] = state["hash"]
        pool.free = OrderedDict.fromkeys(data["free"])
        pool.block_tables = {int(request): tuple(table) for request, table in data["block_tables"].items()}
        return pool

    def states(self) -> tuple[BlockState, ...]:
        free_index = {block: i for i, block in enumerate(self.free)}
        return tuple(
            BlockState(owners, filled, len(owners), hash, free_index.get(block))
            for block, (owners, filled, hash) in enumerate(zip(self.owners, self.filled, self.hash))
        )


class Trace:
    """A run, step by step. `llm.trace()` opens one; closed, by `with` or by `close`, it is complete.

    Attributes:
        config: the engine's settings, as a dict.
        environment: versions, device, model and date, as a dict.
        requests: every request that took part, by id.
        steps: what happened, in order.
        token_texts: what each token that occurs stands for; use `text_of`.
    """

    def __init__(
        self,
        config: dict[str, Any],
        environment: dict[str, str],
        pool: Pool,
        text_of: Callable[[int], str],
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.environment = environment
        self.requests: dict[int, TracedRequest] = {}
        self.steps: list[Step] = []
        self.token_texts: dict[int, str] = {}
        self._text_of = text_of
        self._on_close = on_close
        self._opened = perf_counter()
        self._keyframes = [pool]  # the state before step 0, 32, 64 ...

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Record no more. Calling it twice is fine."""
        self._on_close()
        self._on_close = lambda: None
        self._pool_before(len(self.steps))  # so that the first look at a long trace need not replay all of it

    def __repr__(self) -> str:
        return (
            f"Trace: {len(self.steps)} steps, {len(self.requests)} requests, {self.num_blocks} blocks of "
            f"{self.block_size} tokens"
        )

    @property
    def num_blocks(self) -> int:
        return self.config["num_kv_blocks"]

    @property
    def block_size(self) -> int:
        return self.config["block_size"]

    def now(self) -> float:
        """Seconds since the trace was opened."""
        return perf_counter() - self._opened

    def text_of(self, token_id: int) -> str:
        """What a token stands for; its number in angle brackets if the model has no tokenizer."""
        if token_id not in self.token_texts:
            self.token_texts[token_id] = self._text_of(token_id)
        return self.token_texts[token_id]

    # -- The state after a step ----------------------------------------------------------------------------------------

    def blocks_at(self, index: int) -> tuple[BlockState, ...]:
        """Every block after step `index`; -1 is the last step. IndexError if there is no such step."""
        return self._pool_after(index).states()

    def block_tables_at(self, index: int) -> dict[int, tuple[int, ...]]:
        """The block table of each request that holds blocks after step `index`."""
        return self._pool_after(index).block_tables

    def pools(self) -> Iterator[Pool]:
        """The blocks after each step in turn: one `Pool`, which changes from step to step."""
        pool = self._keyframes[0].copy()
        for step in self.steps:
            pool.apply(step.event_rows)
            yield pool

    def blocks_before(self) -> tuple[BlockState, ...]:
        """Every block when the trace was opened."""
        return self._keyframes[0].states()

    def block_tables_before(self) -> dict[int, tuple[int, ...]]:
        """The block table of each request that held blocks when the trace was opened."""
        return self._keyframes[0].block_tables

    def _pool_after(self, index: int) -> Pool:
        if not -len(self.steps) <= index < len(self.steps):
            raise IndexError(f"there is no step {index}: the trace has {len(self.steps)} steps")
        return self._pool_before(index % len(self.steps) + 1)

    def _pool_before(self, index: int) -> Pool:
        while len(self._keyframes) <= index // STEPS_PER_KEYFRAME:
            first = (len(self._keyframes) - 1) * STEPS_PER_KEYFRAME
            self._keyframes.append(self._replay(self._keyframes[-1], first, first + STEPS_PER_KEYFRAME))
        first = index // STEPS_PER_KEYFRAME * STEPS_PER_KEYFRAME
        return self._replay(self._keyframes[index // STEPS_PER_KEYFRAME], first, index)

    def _replay(self, pool: Pool, start: int, end: int) -> Pool:
        pool = pool.copy()
        for step in self.steps[start:end]:
            pool.apply(step.event_rows)
        return pool

    # -- Files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the trace as JSON, compressed if the name ends in ".gz". docs/api.md describes the format."""
        text = json.dumps(self.to_dict(), separators=(",", ":"))
        if str(path).endswith(".gz"):
            Path(path).write_bytes(gzip.compress(text.encode(), compresslevel=5, mtime=0))
        else:
            Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read a saved trace. ValueError if the file is not one, is not whole, or comes from a newer nanovllm."""
        try:
            content = Path(path).read_bytes()
            data = json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
        except (EOFError, ValueError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is not a trace, or is cut off ({error}); record and save it again") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path} is not a trace of nanovllm: it does not say that its format is {FORMAT!r}")
        version = data.get("version")
        if isinstance(version, int) and version > VERSION:
            raise ValueError(
                f"{path} has version {version} of the trace format, and this nanovllm reads up to {VERSION}; "
                "update nanovllm"
            )
        try:
            if not isinstance(version, int):
                raise TypeError(f"its version is {version!r}")
            return cls.from_dict(data)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged trace: {type(error).__name__} {error}; record it again") from error

    def to_chrome(self, path: str | Path) -> None:
        """Write the trace for https://ui.perfetto.dev: the phases of each step as slices, and counters below."""
        Path(path).write_text(json.dumps({"traceEvents": chrome_events(self)}), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The trace as `save` writes it."""
        for token_id in sorted({t for r in self.requests.values() for t in (*r.prompt_token_ids, *r.output_token_ids)}):
            self.text_of(token_id)
        return {
            "format": FORMAT,
            "version": VERSION,
            "config": self.config,
            "environment": self.environment,
            "requests": [attributes(request) for request in self.requests.values()],
            "token_texts": self.token_texts,
            "pool": self._keyframes[0].to_dict(),
            "steps": [step.to_dict() for step in self.steps],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Trace":
        """The trace that `to_dict` made a dict of."""
        pool = Pool.from_dict(data["pool"])
        texts = {int(token_id): text for token_id, text in data["token_texts"].items()}
        trace = cls(data["config"], data["environment"], pool, texts.__getitem__)
        trace.token_texts = texts
        trace.requests = {request["id"]: TracedRequest(**request) for request in data["requests"]}
        trace.steps = [Step.from_dict(step) for step in data["steps"]]
        trace.close()
        return trace
