"""Sentences: what a step changed, in words; and the words of lists and numbers."""

from collections.abc import Collection, Iterable, Sized
from typing import TYPE_CHECKING

from nanovllm.engine.trace import Step

if TYPE_CHECKING:
    from nanovllm.viz.frames import RequestFrame

MAX_NAMED = 6  # a sentence names up to so many requests or blocks; of more, the first three "and 12 more"


class Teller:
    """Says in a few short sentences what a step changed; one who has not seen the picture must understand it."""

    def __init__(
        self,
        step: Step,
        before: dict[int, "RequestFrame"],
        now: dict[int, "RequestFrame"],
        returned: dict[int, list[int]],
        num_free: dict[int, int],
    ) -> None:
        self.step, self.before, self.now = step, before, now
        self.returned, self.num_free = returned, num_free

    def sentence(self) -> str:
        step = self.step
        said: list[str] = []
        if any(event.kind == "clear" for event in step.block_events):
            said.append("The prefix cache is emptied: all blocks are as new")
        said += self.preemptions()
        if step.error is not None:
            said.append(self.failure(step.error))
        else:
            said += [*self.prefills(), *self.decodes(), *self.evictions()]
        said += self.endings()
        return ". ".join(said) + "." if said else "Nothing changes."

    def preemptions(self) -> list[str]:
        said: list[str] = []
        for victim in self.step.preempted:
            needy, name = self.needy(victim), self.now[victim].name
            needs = "needs more blocks than are free" if self.num_free.get(victim) else "needs a block, none is free"
            if needy == victim:
                words = f"{name} {needs}; it came last, so it is preempted"
            elif said:
                words = f"That is not enough: {name} is preempted"
            else:
                words = f"{self.now[needy].name} {needs}: {name} is preempted"
            said.append(words + self.blocks_of(victim))
        return said

    def needy(self, victim: int) -> int:
        """For whom a request was preempted: the next to take a block; if nobody did, the last victim, in vain."""
        events = iter(self.step.block_events)
        any(event.kind == "free" and event.request == victim for event in events)  # goes on to there
        takers = (e.request for e in events if e.kind == "allocate" and e.request is not None)
        return next(takers, self.step.preempted[-1])

    def failure(self, error: str) -> str:
        stopped = [i for i, was in self.before.items() if was.is_running and i not in self.step.preempted]
        stopped = [i for i in stopped if i not in self.step.finished]
        said = f"The step fails ({error})"
        if stopped:
            said += f": {names(self.now[i] for i in stopped)} {plural(stopped, 'gives its', 'give their')} blocks back"
        return said

    def prefills(self) -> list[str]:
        workers = [r for r in self.now.values() if r.did == "prefill"]
        said = []
        for r in workers[:MAX_NAMED]:
            was = self.before[r.id]
            words = r.name
            if was.is_waiting:
                words += " joins again" if was.status == "preempted" else " joins"
                words += f", finds {counted(r.num_hit_tokens, 'token')} in the prefix cache" if r.num_hit_tokens else ""
                words += f" and computes {counted(r.num_new_tokens, 'token')}"
            else:
                words += f" computes {counted(r.num_new_tokens, 'more token')}"
            left = was.num_tokens - r.num_computed_tokens
            said.append(words + (f", {left} to go" if left else ""))
        others = workers[MAX_NAMED:]
        if others:
            total = counted(sum(r.num_new_tokens for r in others), "token")
            said.append(f"{len(others)} more {plural(others, 'computes', 'compute')} {total}")
        return said

    def decodes(self) -> list[str]:
        workers = [r for r in self.now.values() if r.did == "decode"]
        words = plural(workers, "generates one token", "generate one token each")
        return [f"{names(workers)} {words}"] if workers else []

    def evictions(self) -> list[str]:
        evicted = [event.block for event in self.step.block_events if event.kind == "evict"]
        said = f"{numbered(evicted)} {plural(evicted, 'leaves', 'leave')} the prefix cache"
        return [said[0].upper() + said[1:]] if evicted else []

    def endings(self) -> list[str]:
        ended = self.step.finished
        said = [f"{self.now[i].name} is {self.now[i].status}{self.blocks_of(i)}" for i in ended[:MAX_NAMED]]
        others = ended[MAX_NAMED:]
        return [*said, f"{len(others)} more {plural(others, 'is', 'are')} over"] if others else said

    def blocks_of(self, request_id: int) -> str:
        returned = self.returned.get(request_id, [])
        return f", {numbered(returned)} {plural(returned, 'returns', 'return')}" if returned else ""


def plural(things: Sized, one: str, many: str) -> str:
    return one if len(things) == 1 else many


def counted(number: int, noun: str) -> str:
    """1 token; 5 tokens."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def names(requests: Iterable["RequestFrame"]) -> str:
    return listed([request.name for request in requests])


def listed(words: list[str]) -> str:
    """A, B and C; of many only the first few."""
    if len(words) > MAX_NAMED:
        words = [*words[:3], f"{len(words) - 3} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def numbered(blocks: Collection[int]) -> str:
    """block 3; blocks 0-2, 5 and 6."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    words = []
    for run in runs:
        words += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(block) for block in run]
    return plural(blocks, "block ", "blocks ") + listed(words)
