"""Frames: what there is to see after each step of a trace, computed without drawing anything.

    frames = Frames(trace)
    frames[0]              # before the first step
    frames[i + 1]          # after step i
    frames[i + 1].sentence # what changed in it

A frame is plain data. The renderers draw it: text.py as characters, figures.py as a static picture, live.py in the
browser. A trace that is still growing is fine: its new steps are there when they are asked for. The blocks of a frame
are computed anew from the trace whenever they are asked for: a long run has too many of them to keep.
"""

import hashlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count, islice, takewhile, zip_longest
from typing import Any, NamedTuple

from nanovllm.engine.trace import BlockState, Scheduled, Step, Trace
from nanovllm.viz.sentences import Teller, listed, plural
from nanovllm.viz.theme import letter


class RequestFrame(NamedTuple):
    """A request after a step. What it did *in* the step stands in `did`, `num_new_tokens` and `num_hit_tokens`."""

    id: int
    name: str
    status: str  # waiting, prefill, decode, preempted, finished or aborted; one who runs: what it did last
    num_prompt_tokens: int
    num_tokens: int  # prompt and what has been generated
    num_computed_tokens: int  # of these, those whose keys and values the cache holds, or held at the end
    block_table: tuple[int, ...] = ()
    did: str = ""  # prefill, decode, wait, preempted or failed; nothing between steps, and once it is over
    num_new_tokens: int = 0  # computed in this step
    num_hit_tokens: int = 0  # found in the prefix cache in this step

    @property
    def is_running(self) -> bool:
        return self.status in ("prefill", "decode")

    @property
    def is_waiting(self) -> bool:
        return self.status in ("waiting", "preempted")

    @property
    def is_over(self) -> bool:
        return self.status in ("finished", "aborted")


@dataclass(frozen=True, slots=True)
class Frame:
    """Everything to see after a step, and before what happens next."""

    index: int  # of the step; -1 before the first
    title: str  # "step 3"; "after step 3" for what happened between two steps
    sentence: str
    requests: tuple[RequestFrame, ...]  # those that have come, in the order of coming
    changed: frozenset[int]  # blocks that the step took, filled, shared, gave back or evicted
    num_tokens: int  # computed in the step
    num_used_blocks: int
    frames: "Frames" = field(repr=False, compare=False)

    @property
    def blocks(self) -> tuple[BlockState, ...]:
        """Every block of the pool."""
        return self.frames.blocks_after(self.index)

    @property
    def num_kept_blocks(self) -> int:
        """Blocks that nobody holds, but that the prefix cache still finds."""
        return sum(block.ref_count == 0 and block.hash is not None for block in self.blocks)

    @property
    def summary(self) -> str:
        """The whole in one line."""
        running, waiting = sum(r.is_running for r in self.requests), sum(r.is_waiting for r in self.requests)
        used = f"{self.num_used_blocks} of {self.frames.trace.num_blocks} blocks in use"
        return f"{running} running, {waiting} waiting, {used}, {self.num_kept_blocks} kept for the prefix cache"


class Frames:
    """The frames of a trace, one more than it has steps; `names` are the requests' letters, A for the first to come."""

    def __init__(self, trace: Trace, names: dict[int, str] | None = None) -> None:
        self.trace = trace
        self.names = dict(names or {})
        self._frames: list[Frame] = []
        self._num_owners = [block.ref_count for block in trace.blocks_before()]  # after the last frame that was made
        self._block_tables = dict(trace.block_tables_before())
        self.blocks_after = lru_cache(maxsize=4)(self._blocks_after)

    def __len__(self) -> int:
        return len(self.trace.steps) + 1

    def __getitem__(self, index: int) -> Frame:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no frame {index}: the trace has {len(self.trace.steps)} steps")
        index %= len(self)
        while len(self._frames) <= index:
            self._frames.append(self._next())
        return self._with_newcomers(self._frames[index])

    def name(self, request_id: int) -> str:
        """The letter of a request."""
        if request_id not in self.names:
            taken = set(self.names.values())
            free = (name for name in map(letter, count()) if name not in taken)
            for newcomer in self.trace.requests:  # in the order of coming, whoever is asked for first
                if newcomer not in self.names:
                    self.names[newcomer] = next(free)
        return self.names[request_id]

    def history(self, request_id: int) -> list[RequestFrame | None]:
        """A request after step 0, step 1 and so on; None before it came."""
        place = list(self.trace.requests).index(request_id)
        frames = [self[i] for i in range(1, len(self))]
        return [frame.requests[place] if place < len(frame.requests) else None for frame in frames]

    def text(self, request: RequestFrame, start: int, end: int) -> str:
        """The text of its tokens `start` to `end`, of those that it has."""
        traced = self.trace.requests[request.id]
        token_ids = (traced.prompt_token_ids + traced.output_token_ids)[: request.num_tokens]
        return "".join(self.trace.text_of(token_id) for token_id in token_ids[start:end])

    def index_of(self, step: int | None) -> int:
        """The frame after a step, counted from the end if negative; for None the first with most blocks in use.

        IndexError if there is no such step.
        """
        if step is None:
            return max(range(len(self)), key=lambda i: (self[i].num_used_blocks, -i))
        return range(1, len(self))[step]

    def digest(self) -> str:
        """A fingerprint of all frames: it changes if any block changes hands anywhere. Times do not count."""
        digest = hashlib.sha256(repr(self.trace.blocks_before()).encode())
        last: tuple[RequestFrame, ...] = ()
        for i in range(len(self)):
            requests = self[i].requests
            digest.update(repr([tuple(now) for now, was in zip_longest(requests, last) if now != was]).encode())
            last = requests
        for step, pool in zip(self.trace.steps, self.trace.pools()):
            changed = sorted({event.block for event in step.block_events})
            digest.update(repr([(b, pool.owners[b], pool.filled[b], pool.hash[b]) for b in changed]).encode())
            digest.update(repr([b for b in changed if b in pool.free]).encode())
        return digest.hexdigest()[:12]

    def _blocks_after(self, step_index: int) -> tuple[BlockState, ...]:
        return self.trace.blocks_at(step_index) if step_index >= 0 else self.trace.blocks_before()

    # -- Making them ---------------------------------------------------------------------------------------------------

    def _next(self) -> Frame:
        index = len(self._frames) - 1
        if index < 0:
            return self._frame(-1, "before the first step", "", (), frozenset(), 0)
        step, last = self.trace.steps[index], self._frames[-1]
        title = f"step {index}"
        if not (step.scheduled_rows or step.preempted):
            title = f"after {last.title}" if last.title.startswith("step") else last.title
        before = {request.id: request for request in self._with_newcomers(last).requests}
        returned, num_free = self._follow_blocks(step)
        shares = {share.id: share for share in step.scheduled}
        hits = {event.request for event in step.block_events if event.kind == "share"}
        now = {i: self._follow(step, was, shares.get(i), i in hits) for i, was in before.items()}
        sentence = Teller(step, before, now, returned, num_free).sentence()
        changed = frozenset(event.block for event in step.block_events if event.kind != "clear")
        return self._frame(index, title, sentence, tuple(now.values()), changed, 0 if step.error else step.num_tokens)

    def _frame(
        self,
        index: int,
        title: str,
        sentence: str,
        requests: tuple[RequestFrame, ...],
        changed: frozenset[int],
        num_tokens: int,
    ) -> Frame:
        num_used_blocks = len(self._num_owners) - self._num_owners.count(0)
        return Frame(index, title, sentence, requests, changed, num_tokens, num_used_blocks, self)

    def _with_newcomers(self, frame: Frame) -> Frame:
        """The frame with those requests, too, that came after its step and before the next."""
        later = islice(self.trace.requests.values(), len(frame.requests), None)
        newcomers = [self._newcomer(r.id) for r in takewhile(lambda r: r.arrival == frame.index + 1, later)]
        said = [frame.sentence] if frame.sentence else []
        running, waiting = ([r.name for r in newcomers if r.is_running is runs] for runs in (True, False))
        if running:
            said.append(f"{listed(running)} {plural(running, 'runs', 'run')} already.")
        if waiting:
            said.append(f"{listed(waiting)} {plural(waiting, 'arrives', 'arrive')}.")
        sentence = " ".join(said) or "Nothing has happened yet."
        return replace(frame, sentence=sentence, requests=(*frame.requests, *newcomers))

    def _newcomer(self, request_id: int) -> RequestFrame:
        request = self.trace.requests[request_id]
        num_prompt_tokens = num_tokens = len(request.prompt_token_ids)
        table: tuple[int, ...] = ()
        status = "waiting"
        if request.arrival == 0:  # it may have been there when the trace was opened
            num_sampled = sum(request_id in step.sampled for step in self.trace.steps)
            num_tokens += len(request.output_token_ids) - num_sampled
            table = self.trace.block_tables_before().get(request_id, ())
            generates = num_prompt_tokens < num_tokens
            if table:
                status = "decode" if generates and request.num_computed_tokens == num_tokens - 1 else "prefill"
            elif generates:
                status = "preempted"
        num_computed = request.num_computed_tokens
        return RequestFrame(
            request_id, self.name(request_id), status, num_prompt_tokens, num_tokens, num_computed, table
        )

    def _follow_blocks(self, step: Step) -> tuple[dict[int, list[int]], dict[int, int]]:
        """Bring the block tables to where they are after `step`.

        Returns, for each request that gave its blocks back, those that nobody else holds, and how many were free then.
        """
        returned: dict[int, list[int]] = {}
        num_free: dict[int, int] = {}
        for event in step.block_events:
            block, request = event.block, event.request
            if request is None:
                continue  # evicted or cleared: nobody's table changes
            if event.kind in ("allocate", "share"):
                self._num_owners[block] += 1
                self._block_tables[request] = (*self._block_tables.get(request, ()), block)
            elif event.kind == "free":
                if self._block_tables.pop(request, None):  # all of them go at once
                    returned[request], num_free[request] = [], self._num_owners.count(0)
                self._num_owners[block] -= 1
                if self._num_owners[block] == 0:
                    returned[request].append(block)
        return returned, num_free

    def _follow(self, step: Step, was: RequestFrame, share: Scheduled | None, hit: bool) -> RequestFrame:
        """A request after `step`: `share` is what was computed of it, `hit` says that it was found in the cache."""
        if was.is_over:
            return was._replace(did="", num_new_tokens=0, num_hit_tokens=0) if was.did else was
        id, table = was.id, self._block_tables.get(was.id, ())
        status, num_computed, num_new, num_hit = was.status, was.num_computed_tokens, 0, 0
        did = "wait" if step.scheduled_rows or step.preempted else ""
        if id in step.preempted:
            did = "preempted"
        elif share is not None and step.error is not None:
            did = "failed"
        elif share is not None:
            num_new, num_computed = share.num_new_tokens, share.num_computed_tokens + share.num_new_tokens
            num_hit = share.num_computed_tokens if hit else 0
            generates = was.is_running and was.num_prompt_tokens < was.num_tokens == was.num_computed_tokens + 1
            status = did = "decode" if generates else "prefill"
        if id in step.finished:
            status = "aborted" if self.trace.requests[id].finish_reason == "abort" else "finished"
        elif was.is_running and not table:  # it was preempted, or the step failed
            status, num_computed = "preempted", 0
        num_tokens = was.num_tokens + (id in step.sampled)
        return RequestFrame(
            id, was.name, status, was.num_prompt_tokens, num_tokens, num_computed, table, did, num_new, num_hit
        )
