"""What chapter 04 shares: percentiles, slots over steps as a picture, and the exercise checks."""

import math
import random
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.trace import Trace
from nanovllm.lessons.chapter_02 import make_sequence
from nanovllm.lessons.checks import attempted, exercise
from nanovllm.lessons.tiny import tiny_llm
from nanovllm.viz.theme import EMPTY, QUIET, colour, hatch, ink_on, letter, new_figure, styled


def percentile(values: Collection[float], percent: float) -> float:
    """The smallest of the values that so many percent of them do not exceed (nearest rank)."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


# -- Slots over steps --------------------------------------------------------------------------------------------------


class Static(Scheduler):
    """Static batching: nobody joins before the whole batch is done."""

    def schedule(self) -> Batch:
        self.is_open = not self.running
        return super().schedule()

    def _admit(self, seq: Sequence) -> bool:
        return self.is_open and super()._admit(seq)


def slots_over_steps(trace: Trace, num_slots: int) -> list[list[int | None]]:
    """For each step who sits in which slot. A request takes the first free one, and keeps it to its end."""
    slots: list[int | None] = [None] * num_slots
    seen = []
    for step in trace.steps:
        for share in step.scheduled:
            if share.id not in slots:
                slots[slots.index(None)] = share.id
        seen.append(list(slots))
        slots = [None if request in (*step.finished, *step.preempted) else request for request in slots]
    return seen


def draw_slots_over_steps(runs: dict[str, list[list[int | None]]]) -> Figure:
    """A row for each slot, a column for each step, for several runs one below the other."""
    longest = max(map(len, runs.values()))
    figure = new_figure(9, 1.9 * len(runs) + 0.3)
    with styled():
        axes = figure.subplots(len(runs), 1, squeeze=False, sharex=True)[:, 0]
        for ax, (title, seen) in zip(axes, runs.items()):
            num_slots = len(seen[0])
            for row in range(num_slots):
                draw_slot(ax, row, [slots[row] for slots in seen])
            ax.set(xlim=(0, longest), ylim=(num_slots - 0.5, -0.5), ylabel="slot")
            ax.set_yticks(range(num_slots))
            ax.tick_params(length=0)
            num_idle = sum(slots.count(None) for slots in seen)
            ax.set_title(f"{title}: {len(seen)} steps, {num_idle} of {num_slots * len(seen)} slot-steps idle")
        axes[-1].set_xlabel("step of the engine")
    return figure


def draw_slot(ax: Axes, row: int, requests: list[int | None]) -> None:
    """One slot through time: a box for each request that sits in it, dots where nobody does."""
    start = 0
    for step in range(1, len(requests) + 1):
        if step < len(requests) and requests[step] == requests[start]:
            continue
        request, length = requests[start], step - start
        if request is None:
            style: dict[str, Any] = dict(facecolor=EMPTY, edgecolor=QUIET, hatch="....", linewidth=0)
        else:
            name = letter(request)
            style = dict(facecolor=colour(name), hatch=hatch(name), edgecolor="white", linewidth=0)
        ax.add_patch(Rectangle((start, row - 0.4), length, 0.8, **style))
        if request is not None:
            ax.add_patch(Rectangle((start, row - 0.4), length, 0.8, facecolor="none", edgecolor="white"))
            plate = dict(boxstyle="round,pad=0.15", facecolor=colour(name), edgecolor="none")
            ink = ink_on(colour(name))
            ax.text(start + length / 2, row, name, ha="center", va="center", fontweight="bold", color=ink, bbox=plate)
        start = step


def record_batching(policy: type[Scheduler]) -> list[list[int | None]]:
    """Eight requests in four slots."""
    llm = tiny_llm(num_kv_blocks=64, max_num_seqs=4, enable_prefix_caching=False, scheduler=policy)
    params = [SamplingParams(max_tokens=n, ignore_eos=True, seed=0) for n in (3, 12, 5, 20, 6, 4, 14, 8)]
    with llm.trace() as trace:
        llm.generate([[7] * 8] * len(params), params, use_tqdm=False)
    return slots_over_steps(trace, 4)


def draw_batching() -> Figure:
    """The same eight requests in static batches, and in a batch that changes with every step."""
    runs = {"Static batches": record_batching(Static), "Continuous batching": record_batching(Scheduler)}
    return draw_slots_over_steps(runs)


# -- Exercise checks ---------------------------------------------------------------------------------------------------


def run_in_a_tight_pool(random: random.Random) -> Trace:
    """A run of ten random requests in which some lose their blocks, and compute them again in chunks."""
    llm = tiny_llm(num_kv_blocks=12, max_num_seqs=6, max_num_batched_tokens=16, enable_prefix_caching=False)
    prompts = [[7] * random.randint(5, 40) for _ in range(10)]
    params = [SamplingParams(max_tokens=random.randint(2, 40), ignore_eos=True, seed=0) for _ in prompts]
    with llm.trace() as trace:
        llm.generate(prompts, params, use_tqdm=False)
    llm.close()
    return trace


@exercise(1, "The longest pause of all is what a reader notices; the median hides it.")
def check_longest_pause(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    trace = run_in_a_tight_pool(random)
    for request in trace.requests:
        steps = [step.index for step in trace.steps if request in step.sampled]
        right = max(b - a for a, b in pairwise(steps))
        got = attempted(answer(trace, request))
        case = f"request {request} gets a token in the steps {shortened(steps)}"
        if got == right:
            continue
        if got == right - 1:
            yield f"{case}; you return {got}. From step 3 to step 5 it takes two steps, not one."
        elif got == steps[-1] - steps[0]:
            yield f"{case}; you return {got}, from the first token to the last. Which *two* are furthest apart?"
        else:
            yield f"{case}; at most {right} steps lie between two of them, and you return {got}."


def shortened(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 12 else f"{', '.join(map(str, steps[:12]))}, …"


@exercise(2, "In vLLM this is the number that you give to `--max-num-batched-tokens`.")
def check_largest_budget(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    cases = [(200, 60, 2), (100, 60, 2)]
    cases += [(random.randint(100, 900), random.randint(5, 60), random.randint(1, 9)) for _ in range(20)]
    for target, fixed, per_token in cases:
        right = (target - fixed) // per_token
        got = attempted(answer(target, fixed, per_token))
        case = f"a step takes {fixed} ms and {per_token} ms for each token, and may take {target} ms"
        if got == right:
            continue
        if got == target // per_token:
            yield f"{case}: with {got} tokens it takes {fixed + got * per_token}. The fixed part comes with every step."
        elif isinstance(got, float):
            yield f"{case}: you return {got}. A budget is a whole number of tokens; round down."
        elif got > right:
            yield f"{case}: with {got} tokens it takes {fixed + got * per_token} ms, which is too long."
        else:
            yield f"{case}: {got} tokens are fewer than you could take; {right} fit."


@dataclass(slots=True)
class Played:
    """What a policy did with a workload, in steps."""

    requests: list[tuple[int, int, int]]  # arrival, prompt length, answer length
    admitted: dict[int, int] = field(default_factory=dict)  # request -> the step that let it in first
    first_token: dict[int, int] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)

    @property
    def waits(self) -> list[int]:
        """Time to first token of each request that got one."""
        return [step + 1 - self.requests[i][0] for i, step in self.first_token.items()]


def play(
    scheduler: Scheduler, requests: list[tuple[int, int, int]], num_steps: int = 5000
) -> Iterator[tuple[int, Batch, dict[int, int], Played]]:
    """Let a scheduler plan a workload, without a model: step, batch, what the running had computed, and the record."""
    played, coming = Played(requests), deque(enumerate(requests))
    for now in range(num_steps):
        while coming and coming[0][1][0] <= now:
            i, (_, prompt_len, answer_len) = coming.popleft()
            scheduler.add(make_sequence(i, prompt_len, answer_len))
        if not scheduler.has_work() and not coming:
            return
        computed = {seq.id: seq.num_computed_tokens for seq in scheduler.running}
        batch = scheduler.schedule()
        for seq in batch.admitted:
            played.admitted.setdefault(seq.id, now)
        for share in batch.scheduled:
            if share.samples:
                played.first_token.setdefault(share.seq.id, now)
        yield now, batch, computed, played
        played.done.update(seq.id for seq in scheduler.update(batch, [7] * sum(s.samples for s in batch.scheduled)))


def make_scheduler(policy: Any, num_blocks: int, max_num_seqs: int, budget: int = 256) -> Scheduler:
    """An engine's scheduler without the engine."""
    config = Config(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    return policy(config, BlockManager(num_blocks, 16, enable_prefix_caching=False))


def is_policy(answer: Any) -> bool:
    return isinstance(attempted(answer), type) and issubclass(answer, Scheduler)


NO_CLASS = "give the class, a subclass of `Scheduler`, not an object of it."


@exercise(3, "Less is computed twice. But who has just begun is always the one to lose: first come is no longer first.")
def check_cheapest(answer: Any, random: random.Random) -> Iterator[str]:
    if not is_policy(answer):
        yield NO_CLASS
        return
    for _ in range(40):
        # Every third prompt is long, and computed in chunks: in the middle of them a request has many tokens, few of
        # them computed. In one such run of seven somebody loses more who goes by the number of tokens.
        long = [(random.randint(0, 40), random.randint(90, 130), random.randint(20, 60)) for _ in range(8)]
        short = [(random.randint(0, 40), random.randint(5, 40), random.randint(20, 60)) for _ in range(16)]
        requests = sorted(long + short)
        scheduler = make_scheduler(answer, num_blocks=random.randint(20, 26), max_num_seqs=8, budget=16)
        for now, batch, computed, played in play(scheduler, requests):
            left = dict(computed)
            for victim in batch.preempted:
                cheapest = min(left, key=lambda i: left[i])
                if left[victim.id] > left[cheapest]:
                    yield (
                        f"in step {now} request {victim.id} loses its blocks, with {left[victim.id]} tokens computed. "
                        f"Request {cheapest} has computed {left[cheapest]} and would lose less. (The victim is the "
                        "last of `self.running`.)"
                    )
                del left[victim.id]
            if not batch.scheduled and not batch.preempted and scheduler.has_work():
                yield f"in step {now} nobody runs, although {len(scheduler.waiting)} wait."
        if len(played.done) < len(requests):
            yield f"after 5,000 steps only {len(played.done)} of {len(requests)} requests are done."


@exercise(4, "Short ones go first, and whoever waits long enough becomes the shortest of all.")
def check_ageing(answer: Any, random: random.Random) -> Iterator[str]:
    if not is_policy(answer):
        yield NO_CLASS
        return
    for _ in range(3):
        yield from complaints_about_starving(answer, random)
    workloads = {
        ("", "ones"): mixed_workload(random),
        (" where all prompts are alike", "answers"): equal_prompts(random),
        (" where all answers are alike", "prompts"): equal_answers(random),
    }
    for (case, what), workload in workloads.items():
        waits = {}
        for policy in (answer, Scheduler):
            for *_, played in play(make_scheduler(policy, num_blocks=400, max_num_seqs=8), workload):
                pass
            waits[policy] = median(played.waits)
        # Of that the solution had at most 0.88 in 300 random workloads of the first kind, and in 150 of the others 0.23
        # and 0.67.
        if waits[answer] > 0.95 * waits[Scheduler]:
            yield (
                f"nobody starves, but{case} the short ones gain nothing: half of the requests have their first token "
                f"after {waits[answer]:.0f} steps, and first come, first served gives {waits[Scheduler]:.0f}. "
                f"Do short {what} go first?"
            )


def mixed_workload(random: random.Random) -> list[tuple[int, int, int]]:
    """More than eight slots can take at once, for a while; every eighth prompt is long."""
    now, requests = 0.0, []
    for i in range(48):
        now += random.expovariate(1 / 2)
        prompt_len = random.randint(200, 400) if i % 8 == 4 else random.randint(8, 60)
        requests.append((int(now), prompt_len, random.randint(4, 60)))
    return requests


def equal_prompts(random: random.Random) -> list[tuple[int, int, int]]:
    """Requests that differ in their answers alone; every third one's is long."""
    return [(i, 16, random.randint(80, 120) if i % 3 == 0 else random.randint(4, 8)) for i in range(48)]


def equal_answers(random: random.Random) -> list[tuple[int, int, int]]:
    """Requests that differ in their prompts alone; every third one's is long."""
    return [(i, random.randint(400, 700) if i % 3 == 0 else random.randint(8, 40), 8) for i in range(48)]


def complaints_about_starving(policy: Any, random: random.Random) -> Iterator[str]:
    """A stream of short requests, as many as four slots can take and a little more; three long ones among them."""
    long = {random.randint(5, 60) for _ in range(3)}
    requests = []
    for now in range(1200):
        if now in long:
            requests.append((now, random.randint(200, 300), 40))
        if random.random() < 0.55:
            requests.append((now, random.randint(8, 20), random.randint(4, 12)))
    patience = 400  # nobody who comes so much later goes first
    for now, batch, _, played in play(make_scheduler(policy, num_blocks=400, max_num_seqs=4), requests):
        newest = max((requests[seq.id][0] for seq in batch.admitted), default=0)
        for i, (arrival, prompt_len, answer_len) in enumerate(requests):
            if arrival + patience >= newest:
                break
            if i not in played.admitted:
                num_overtook = sum(other > i for other in played.admitted)
                yield (
                    f"request {i}, a prompt of {prompt_len} tokens for an answer of {answer_len}, came in step "
                    f"{arrival} and starves: in step {now} it still waits, and {num_overtook} requests that came after "
                    f"it were let in first, the last of them {newest - arrival} steps younger. Waiting must count."
                )
    if len(played.done) < len(requests):
        yield f"after 5,000 steps only {len(played.done)} of {len(requests)} requests are done."
