"""What chapter 04 shares: percentiles, the picture of slots, exercise checks on wrong answers, figures in the text."""

import random
import re

import pytest

from nanovllm import SamplingParams
from nanovllm.engine.scheduler import Scheduler
from nanovllm.lessons.chapter_04 import (
    Static,
    draw_slots_over_steps,
    make_scheduler,
    mixed_workload,
    percentile,
    play,
    record_batching,
    slots_over_steps,
)
from nanovllm.lessons.series import NOTEBOOKS
from nanovllm.lessons.tiny import tiny_llm
from tests.test_notebooks import check_numbers_are_seen, check_told, read, recorded_benchmark

CHAPTER = NOTEBOOKS / "04_scheduling.ipynb"

# -- Percentiles and slots ---------------------------------------------------------------------------------------------


def test_percentile_is_one_of_the_values():
    assert percentile([3, 1, 2], 50) == 2
    assert percentile(list(range(1, 201)), 99) == 198
    assert percentile([7], 99) == 7


def test_static_batches_admit_nobody_before_all_are_done():
    scheduler = make_scheduler(Static, num_blocks=40, max_num_seqs=2)
    admitted = {}
    for now, batch, computed, played in play(scheduler, [(0, 4, 3), (0, 4, 6), (0, 4, 2), (1, 4, 2)]):
        assert not (batch.admitted and computed)
        admitted |= {seq.id: now for seq in batch.admitted}
    assert admitted == {0: 0, 1: 0, 2: 6, 3: 6}


def test_a_request_keeps_its_slot_to_the_end():
    llm = tiny_llm(num_kv_blocks=16, max_num_seqs=2)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 3, 2)]
    with llm.trace() as trace:
        llm.generate([[5], [6], [7]], params, use_tqdm=False)
    assert slots_over_steps(trace, 2) == [[0, 1], [2, 1], [2, 1]]


def test_the_opening_picture_shows_what_its_text_says():
    static, continuous = record_batching(Static), record_batching(Scheduler)
    assert [len(static), len(continuous)] == [34, 23]
    assert [sum(slots.count(None) for slots in run) for run in (static, continuous)] == [64, 20]
    assert static[0] == [0, 1, 2, 3] and static[20] == [4, 5, 6, 7]
    assert (continuous[3][0], continuous[5][2]) == (4, 5)
    figure = draw_slots_over_steps({"static": static, "continuous": continuous})
    assert figure.axes[0].get_xlim() == (0, 34)
    title = read(CHAPTER).cells[0].source
    assert "64 of 136 above, 20 of 92 below" in " ".join(title.split())


DERIVED = {
    "136": "steps × slots, tested above",
    "900": "a decode step over a prompt's token, tested below",
    "408": "400 + 8",
    "6.6": "400 / 61",
    "108000": "chapter 02, rounded",
    "277000": "chapter 02, rounded",
    "1024": "vLLM, EngineArgs.get_batch_defaults",
    "8192": "vLLM, EngineArgs.get_batch_defaults",
}


def test_what_the_fixed_part_is_worth_on_a_gpu():
    bench = recorded_benchmark()
    per_token = bench["prefill, 8 x 1024 tokens"]["milliseconds"] / 8192
    assert round(bench["decode step, batch 1"]["value"] / per_token, -2) == 900


def test_the_numbers_of_the_prose_are_seen():
    check_numbers_are_seen(CHAPTER, re.compile(r"[Cc]hapters?\s\d\d|\b20[12]\d\b|!\[.*?\]|# 04"), DERIVED)


# -- Exercises ---------------------------------------------------------------------------------------------------------

AGEING = """class Ageing(Scheduler):
    def __init__(self, config, block_manager):
        super().__init__(config, block_manager)
        self.now, self.since = 0, {{}}

    def schedule(self):
        self.now += 1
        for seq in self.waiting:
            self.since.setdefault(seq.id, self.now)
        key = lambda seq: {key}
        self.waiting = deque(sorted(self.waiting, key=key))
        return super().schedule()"""

WRONG = [
    (1, "def longest_pause(trace, request):\n"
        "    steps = [s.index for s in trace.steps if request in s.sampled]\n"
        "    return max(b - a for a, b in pairwise(steps)) - 1", "it takes two steps, not one"),
    (1, "def longest_pause(trace, request):\n"
        "    steps = [s.index for s in trace.steps if request in s.sampled]\n"
        "    return steps[-1] - steps[0]", "Which *two* are furthest apart"),
    (1, "def longest_pause(trace, request):\n"
        "    runs = (s.index for s in trace.steps if request in [share.id for share in s.scheduled])\n"
        "    return max(b - a for a, b in pairwise(runs))", "steps lie between two of them"),
    (1, "def longest_pause(trace, request):\n"
        "    return 10_000", "you return 10000"),
    (2, "def largest_budget(target, fixed, per_token):\n"
        "    return target // per_token", "The fixed part comes with every step"),
    (2, "def largest_budget(target, fixed, per_token):\n"
        "    return (target - fixed) / per_token + 0.5", "round down"),
    (2, "def largest_budget(target, fixed, per_token):\n"
        "    return (target - fixed) // per_token + 1", "too long"),
    (2, "def largest_budget(target, fixed, per_token):\n"
        "    return (target - fixed) // per_token - 1", "fewer than you could take"),
    (3, "class Cheapest(Scheduler):\n"
        "    pass", "would lose less"),
    (3, "class Cheapest(Scheduler):\n"
        "    def schedule(self):\n"
        "        self.running.sort(key=lambda seq: seq.num_computed_tokens)\n"
        "        return super().schedule()", "would lose less"),
    (3, "class Cheapest(Scheduler):\n"
        "    def schedule(self):\n"
        "        self.running.sort(key=lambda seq: -seq.num_tokens)\n"
        "        return super().schedule()", "would lose less"),
    (3, "class Cheapest(Scheduler):\n"
        "    def _admit(self, seq):\n"
        "        return False", "nobody runs"),
    (3, "Cheapest = 3", "Give the class"),
    (4, AGEING.format(key="seq.max_num_tokens"), "starves: in step"),
    (4, AGEING.format(key="seq.max_num_tokens - 0.1 * (self.now - self.since[seq.id])"), "starves: in step"),
    (4, AGEING.format(key="self.since[seq.id]"), "the short ones gain nothing"),
    (4, AGEING.format(key="-seq.max_num_tokens"), "Waiting must count"),
    (4, AGEING.format(key="seq.num_tokens - (self.now - self.since[seq.id])"), "Do short answers go first"),
    (4, AGEING.format(key="seq.params.max_tokens - (self.now - self.since[seq.id])"), "Do short prompts go first"),
    (4, "class Ageing(Scheduler):\n"
        "    pass", "Do short ones go first"),
    (4, "Ageing = 3", "Give the class"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "answer", "words"), WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(number, answer, words):
    check_told(CHAPTER, number, answer, words)


def test_play_knows_who_waited_how_long():
    requests = mixed_workload(random.Random(0))
    for *_, played in play(make_scheduler(Scheduler, num_blocks=400, max_num_seqs=8), requests):
        pass
    assert played.done == set(range(len(requests)))
    assert len(played.waits) == len(requests) and min(played.waits) >= 1
