"""Frames: what there is to see after each step of a trace, computed without drawing anything.

    frames = Frames(trace)
    frames[0]              # before the first step
    frames[i + 1]          # after step i
    frames[i + 1].sentence # what changed in it

A frame is plain data. The renderers draw it: text.py as characters, figures.py as a static picture, live.py in the
browser. A trace that is still growing is fine: its new steps are there when they are asked for.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from nanovllm.engine.trace import BlockEvent, BlockState, Step, Trace
from nanovllm.viz.theme import letter

MAX_NAMED = 6  # a sentence names so many requests or blocks, then "and 12 more"


@dataclass(frozen=True, slots=True)
class RequestFrame:
    """A request after a step. What it did *in* the step stands in `num_new_tokens` and `num_hit_tokens`."""

    id: int
    name: str
    status: str  # waiting, prefill, decode, preempted, finished or aborted
    num_prompt_tokens: int
    num_tokens: int  # prompt and what has been generated
    num_computed_tokens: int  # of these, those whose keys and values the cache holds
    num_new_tokens: int  # computed in this step
    num_hit_tokens: int  # found in the prefix cache in this step
    block_table: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """Everything to see after a step."""

    index: int  # of the step; -1 before the first
    title: str  # "step 3"; "before step 0"; "after step 3" for what happened between two steps
    sentence: str
    requests: tuple[RequestFrame, ...]  # those that have come, in the order of coming
    blocks: tuple[BlockState, ...]
    changed: frozenset[int]  # blocks that the step took, filled, shared, gave back or evicted
    num_tokens: int  # computed in the step

    @property
    def num_used_blocks(self) -> int:
        return sum(block.ref_count > 0 for block in self.blocks)

    @property
    def num_kept_blocks(self) -> int:
        """Blocks that nobody holds, but that the prefix cache still finds."""
        return sum(block.ref_count == 0 and block.hash is not None for block in self.blocks)


class Frames:
    """The frames of a trace, one more than it has steps; `names` are the requests' letters, A for the first to come."""

    def __init__(self, trace: Trace, names: dict[int, str] | None = None) -> None:
        self.trace = trace
        self.names = dict(names or {})
        self._frames: list[Frame] = []
        self._requests: dict[int, RequestFrame] = {}  # as they were after the last frame that was made

    def __len__(self) -> int:
        return len(self.trace.steps) + 1

    def __getitem__(self, index: int) -> Frame:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no frame {index}: the trace has {len(self.trace.steps)} steps")
        index %= len(self)
        while len(self._frames) <= index:
            self._frames.append(self._next())
        # Requests that came after the last step are waiting already, though no step has seen them.
        if index == len(self.trace.steps):
            return self._with_newcomers(self._frames[index])
        return self._frames[index]

    def name(self, request_id: int) -> str:
        """The letter of a request."""
        while request_id not in self.names:  # in the order of coming, whoever is asked for first
            newcomer = next(i for i in self.trace.requests if i not in self.names)
            taken = set(self.names.values())
            self.names[newcomer] = next(name for name in map(letter, range(len(taken) + 1)) if name not in taken)
        return self.names[request_id]

    def fullest(self) -> int:
        """The frame in which most blocks are in use, the first of them."""
        return max(range(len(self)), key=lambda i: (self[i].num_used_blocks, -i))

    def digest(self) -> str:
        """A fingerprint of all frames: it changes if any block changes hands anywhere. Times do not count."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            digest.update(repr((self[i].requests, self[i].blocks)).encode())
        return digest.hexdigest()[:12]

    # -- Making them -----------------------------------------------------------------------------------------------------

    def _next(self) -> Frame:
        index = len(self._frames) - 1
        if index < 0:
            self._requests = {r.id: self._newcomer(r.id) for r in self.trace.requests.values() if r.arrival == 0}
            blocks = self.trace.blocks_before()
            return Frame(
                -1, "before step 0", "Nothing has happened yet.", self._shown(), blocks, frozenset(), num_tokens=0
            )
        step = self.trace.steps[index]
        for request in self.trace.requests.values():
            if request.id not in self._requests and request.arrival <= index:
                self._requests[request.id] = self._newcomer(request.id)
        before = dict(self._requests)
        self._follow(step)
        return Frame(
            index=index,
            title=f"step {index}" if step.scheduled or step.preempted else f"after step {index - 1}",
            sentence=self._tell(step, before),
            requests=self._shown(),
            blocks=self.trace.blocks_at(index),
            changed=frozenset(event.block for event in step.block_events if event.kind != "clear"),
            num_tokens=step.num_tokens if step.error is None else 0,
        )

    def _newcomer(self, request_id: int) -> RequestFrame:
        request = self.trace.requests[request_id]
        runs = request.arrival == 0 and request_id in self.trace.block_tables_before()
        num_outputs = len(request.output_token_ids) - sum(request_id in step.sampled for step in self.trace.steps)
        num_tokens = len(request.prompt_token_ids) + num_outputs
        status = "waiting"
        if runs:
            status = "decode" if num_outputs else "prefill"
        return RequestFrame(
            id=request_id,
            name=self.name(request_id),
            status=status,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_tokens=num_tokens,
            num_computed_tokens=request.num_computed_tokens,
            num_new_tokens=0,
            num_hit_tokens=0,
            block_table=self.trace.block_tables_before().get(request_id, ()),
        )

    def _with_newcomers(self, frame: Frame) -> Frame:
        known = {request.id for request in frame.requests}
        newcomers = [self._newcomer(i) for i in self.trace.requests if i not in known]
        if not newcomers:
            return frame
        sentence = listed([r.name for r in newcomers]) + (" waits." if len(newcomers) == 1 else " wait.")
        sentence = sentence if frame.index < 0 else f"{frame.sentence} {sentence}"
        requests = (*frame.requests, *newcomers)
        return Frame(frame.index, frame.title, sentence, requests, frame.blocks, frame.changed, frame.num_tokens)

    def _follow(self, step: Step) -> None:
        """Bring the requests to where they are after `step`."""
        tables = self.trace.block_tables_at(step.index)
        scheduled = {s.id: s for s in step.scheduled}
        hits = {event.request for event in step.block_events if event.kind == "share"}
        for request_id, was in self._requests.items():
            status, num_computed, num_tokens = was.status, was.num_computed_tokens, was.num_tokens
            num_new = num_hit = 0
            if request_id in step.preempted:
                status, num_computed = "preempted", 0
            if request_id in scheduled:
                s = scheduled[request_id]
                num_hit = s.num_computed_tokens if request_id in hits else 0
                num_new = s.num_new_tokens
                num_computed = s.num_computed_tokens + num_new
                status = "decode" if num_new == 1 and num_computed == num_tokens > was.num_prompt_tokens else "prefill"
            num_tokens += request_id in step.sampled
            if step.error is not None and request_id not in tables and status in ("prefill", "decode"):
                status, num_computed, num_new, num_hit = "preempted", 0, 0, 0
            if request_id in step.finished:
                reason = self.trace.requests[request_id].finish_reason
                status, num_computed = ("aborted" if reason == "abort" else "finished"), num_computed
            self._requests[request_id] = RequestFrame(
                request_id,
                was.name,
                status,
                was.num_prompt_tokens,
                num_tokens,
                num_computed,
                num_new,
                num_hit,
                tables.get(request_id, ()),
            )

    def _shown(self) -> tuple[RequestFrame, ...]:
        return tuple(self._requests.values())

    # -- In words --------------------------------------------------------------------------------------------------------

    def _tell(self, step: Step, before: dict[int, RequestFrame]) -> str:
        """What changed in a step, in a few short sentences; one who has not seen the picture must understand it."""
        now, said = self._requests, []
        kinds = {event.kind for event in step.block_events}
        if "clear" in kinds:
            said.append("The prefix cache is emptied: all blocks are as new")
        if step.error is not None:
            said.append(f"The step fails ({step.error}): whoever ran gives the blocks back and waits")
            return ". ".join(said) + "."
        for victim in step.preempted:
            who = self._who_needed(step, victim)
            returned = [e.block for e in step.block_events if e.kind == "free" and e.request == victim]
            said.append(f"{who} needs a block, none is free: {self.name(victim)} is preempted, {blocks(returned)}")
        joined = [i for i in now if now[i].num_new_tokens and before[i].status in ("waiting", "preempted")]
        for i in joined[:MAX_NAMED]:
            hit = f"finds {now[i].num_hit_tokens} tokens in the cache and " if now[i].num_hit_tokens else ""
            said.append(f"{now[i].name} joins, {hit}computes {now[i].num_new_tokens}")
        if len(joined) > MAX_NAMED:
            said.append(f"{len(joined) - MAX_NAMED} more join")
        chunks = [i for i in now if now[i].num_new_tokens and i not in joined and now[i].status == "prefill"]
        chunks = [i for i in chunks if i in now]
        for i in chunks[:MAX_NAMED]:
            said.append(f"{now[i].name} computes {now[i].num_new_tokens} more of its prompt")
        decodes = [s.id for s in step.scheduled if s.id not in joined and s.id not in chunks]
        if decodes:
            names = listed([self.name(i) for i in sorted(decodes)])
            said.append(f"{names} {'generates one token' if len(decodes) == 1 else 'generate one token each'}")
        evicted = [e.block for e in step.block_events if e.kind == "evict"]
        if evicted and "clear" not in kinds:
            said.append(f"{numbered(evicted)} {'loses its' if len(evicted) == 1 else 'lose their'} kept content")
        for i in step.finished[:MAX_NAMED]:
            returned = [e.block for e in step.block_events if e.kind == "free" and e.request == i]
            how = "is aborted" if now[i].status == "aborted" else "is finished"
            said.append(f"{now[i].name} {how}" + (f", {blocks(returned)}" if returned else ""))
        if len(step.finished) > MAX_NAMED:
            said.append(f"{len(step.finished) - MAX_NAMED} more are finished")
        return ". ".join(said) + "." if said else "Nothing changes."

    def _who_needed(self, step: Step, victim: int) -> str:
        """For whom a request was preempted: the next to take a block; itself if nobody did."""
        events: Iterable[BlockEvent] = iter(step.block_events)
        for event in events:
            if event.kind == "free" and event.request == victim:
                break
        return self.name(next((e.request for e in events if e.kind == "allocate" and e.request is not None), victim))


def listed(names: list[str]) -> str:
    """A, B and C; of many only the first few."""
    if len(names) > MAX_NAMED:
        return ", ".join(names[:MAX_NAMED]) + f" and {len(names) - MAX_NAMED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def numbered(ids: list[int]) -> str:
    """block 3; blocks 3, 5 and 6."""
    return ("block " if len(ids) == 1 else "blocks ") + listed([str(i) for i in sorted(ids)])


def blocks(returned: list[int]) -> str:
    return f"{numbered(returned)} {'returns' if len(returned) == 1 else 'return'}"
