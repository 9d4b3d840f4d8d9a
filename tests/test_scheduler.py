"""The scheduler: hand-worked scenes with exact batches and block ids, and random runs on a machine that would notice.

In the scenes a block has four tokens, and a prompt is written with a letter for each token: "aaaa bbbb c". A batch is
written as `(id, first token, number of tokens)` for each sequence in it.
"""

from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from random import Random

import pytest

from nanovllm.engine import block_manager
from nanovllm.engine.block_manager import hash_block
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence, Status
from nanovllm.sampling_params import SamplingParams

from .scheduling import GARBAGE, VOCAB_SIZE, Machine, ids, make_scheduler, make_sequence, shares, step, tokens


def add(scheduler: Scheduler, *prompts: str, max_tokens: int = 8) -> list[Sequence]:
    seqs = [make_sequence(prompt, max_tokens, id=i) for i, prompt in enumerate(prompts)]
    for seq in seqs:
        scheduler.add(seq)
    return seqs


def free_blocks(scheduler: Scheduler) -> list[int]:
    return list(scheduler.block_manager.free)


def steps_until(scheduler: Scheduler, is_reached: Callable[[], bool]) -> Iterator[Batch]:
    for _ in range(1000):
        if is_reached():
            return
        yield step(scheduler)
    raise AssertionError("it does not come to that")


def run_to_the_end(scheduler: Scheduler) -> None:
    for _ in steps_until(scheduler, lambda: not scheduler.has_work()):
        pass


# -- What is in a step -------------------------------------------------------------------------------------------------


def test_a_prompt_is_computed_whole_and_then_token_by_token():
    scheduler = make_scheduler()
    (a,) = add(scheduler, "aaaa b", max_tokens=3)
    batches = [step(scheduler, token) for token in (7, 8, 9)]
    assert [shares(batch) for batch in batches] == [[(0, 0, 5)], [(0, 5, 1)], [(0, 6, 1)]]
    assert [batch.admitted for batch in batches] == [[a], [], []]
    assert a.output_token_ids == [7, 8, 9] and a.finish_reason == "length" and a.is_finished
    assert not scheduler.has_work() and shares(scheduler.schedule()) == []


def test_a_stop_token_ends_the_answer_and_stays_in_it():
    scheduler = make_scheduler()
    a = make_sequence("aaaa", max_tokens=8, stop=[8])
    scheduler.add(a)
    assert scheduler.update(scheduler.schedule(), [7]) == []
    assert scheduler.update(scheduler.schedule(), [8]) == [a]
    assert a.output_token_ids == [7, 8] and a.finish_reason == "stop" and len(free_blocks(scheduler)) == 100


def test_a_long_prompt_is_computed_in_chunks_and_only_the_last_one_samples():
    scheduler = make_scheduler(budget=4)
    (a,) = add(scheduler, "aaaa bbbb cc")
    batches = [step(scheduler) for _ in range(4)]
    assert [shares(batch) for batch in batches] == [[(0, 0, 4)], [(0, 4, 4)], [(0, 8, 2)], [(0, 10, 1)]]
    assert [batch.scheduled[0].samples for batch in batches] == [False, False, True, True]
    assert len(a.output_token_ids) == 2


def test_blocks_are_taken_as_chunks_are_computed():
    scheduler = make_scheduler(budget=6)
    (a,) = add(scheduler, "aaaa bbbb cccc dddd")
    tables = [step(scheduler) and list(a.block_table) for _ in range(3)]
    assert tables == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_prefill_and_decode_share_one_budget_and_decode_comes_first():
    scheduler = make_scheduler(budget=6)
    add(scheduler, "a", "bbbb bb", "cccc cc")
    batches = [step(scheduler) for _ in range(4)]
    assert [shares(batch) for batch in batches] == [
        [(0, 0, 1), (1, 0, 5)],  # b gets what a leaves over
        [(0, 1, 1), (1, 5, 1), (2, 0, 4)],
        [(0, 2, 1), (1, 6, 1), (2, 4, 2)],
        [(0, 3, 1), (1, 7, 1), (2, 6, 1)],
    ]
    assert ids(scheduler.running) == [0, 1, 2] and not scheduler.waiting


def test_sequences_are_admitted_in_the_order_of_arrival_and_nobody_overtakes():
    scheduler = make_scheduler(num_blocks=4)
    a, b, c = add(scheduler, "aaaa aaaa", "bbbb bbbb bbbb", "c", max_tokens=4)
    batches = [step(scheduler) for _ in range(4)]
    assert [ids(batch.admitted) for batch in batches] == [[0], [], [], []], "c would fit, but b is first"
    assert a.is_finished and ids(step(scheduler).admitted) == [1, 2]


def test_as_many_as_fit_are_admitted_in_one_step():
    scheduler = make_scheduler(num_blocks=5)
    add(scheduler, "aaaa", "bbbb bbbb", "cccc c", "d", max_tokens=2)
    assert ids(step(scheduler).admitted) == [0, 1, 2]
    assert free_blocks(scheduler) == []


def test_a_sequence_is_not_admitted_if_the_rest_of_its_prompt_would_not_fit():
    scheduler = make_scheduler(num_blocks=4, budget=6)
    a, b = add(scheduler, "aaaa a", "bbbb bbbb bbbb", max_tokens=3)
    batches = [step(scheduler) for _ in range(4)]
    assert [shares(batch) for batch in batches[:3]] == [[(0, 0, 5)], [(0, 5, 1)], [(0, 6, 1)]], "its first token fits"
    assert shares(batches[3]) == [(1, 0, 6)]


def test_cached_blocks_that_are_free_count_once_when_room_is_reckoned():
    scheduler = make_scheduler(num_blocks=4)
    (a,) = add(scheduler, "aaaa bbbb", max_tokens=1)
    step(scheduler)
    assert a.is_finished and free_blocks(scheduler) == [2, 3, 1, 0]
    b, c = make_sequence("xxxx x", 2, id=1), make_sequence("aaaa bbbb c", 2, id=2)
    scheduler.add(b), scheduler.add(c)
    assert shares(step(scheduler)) == [(1, 0, 5)], "of four blocks two are left, and c's two hits are these"
    assert free_blocks(scheduler) == [1, 0]
    assert shares(step(scheduler)) == [(1, 5, 1)] and b.is_finished
    assert shares(step(scheduler)) == [(2, 8, 1)] and c.num_cached_tokens == 8


# -- When blocks run out -----------------------------------------------------------------------------------------------


def test_the_last_admitted_is_preempted_and_goes_on_where_it_was():
    scheduler = make_scheduler(num_blocks=5)
    a, b = add(scheduler, "aaaa aaaa", "bbbb bbb", max_tokens=8)
    step(scheduler, 1)
    assert (a.block_table, b.block_table, free_blocks(scheduler)) == ([0, 1], [2, 3], [4])
    step(scheduler, 2)
    assert (a.block_table, b.block_table, free_blocks(scheduler)) == ([0, 1, 4], [2, 3], [])
    batch = step(scheduler, 3)  # b needs a third block, and is itself the last
    assert ids(batch.preempted) == [1] and shares(batch) == [(0, 9, 1)]
    assert b.status is Status.WAITING and b.block_table == [] and b.row == -1 and b.num_computed_tokens == 0
    assert b.output_token_ids == [1, 2]
    assert free_blocks(scheduler) == [3, 2]
    for batch in steps_until(scheduler, lambda: a.is_finished):
        assert batch.admitted == []
    assert shares(step(scheduler, 4)) == [(1, 4, 5)], "a has taken its second block, the first was still cached"
    assert b.output_token_ids == [1, 2, 4] and b.num_cached_tokens == 0, "what was cached at first admission counts"
    run_to_the_end(scheduler)
    assert len(b.output_token_ids) == 8 and sorted(free_blocks(scheduler)) == [0, 1, 2, 3, 4]


def test_the_oldest_goes_on_while_others_are_preempted():
    scheduler = make_scheduler(num_blocks=6)
    a, b, c = add(scheduler, "aaaa", "bbbb", "cccc", max_tokens=17)
    preempted = []
    for batch in steps_until(scheduler, lambda: a.is_finished):
        assert batch.scheduled[0].seq is a
        preempted += ids(batch.preempted)
    assert preempted[:2] == [2, 1] and len(a.output_token_ids) == 17
    run_to_the_end(scheduler)


def test_preempted_sequences_wait_before_all_others_in_their_old_order():
    scheduler = make_scheduler(num_blocks=5, max_num_seqs=3)
    a, b, c, d = add(scheduler, "aaaa", "bbbb", "cccc", "d", max_tokens=16)
    for _ in steps_until(scheduler, lambda: ids(scheduler.running) == [0]):
        pass
    assert ids(scheduler.waiting) == [1, 2, 3]


class BackOfTheQueue(Scheduler):
    """A policy by which a preempted sequence waits behind all others."""

    def _preempt(self) -> Sequence:
        seq = super()._preempt()
        self.waiting.rotate(-1)
        return seq


def test_a_step_that_preempted_admits_nobody():
    scheduler = make_scheduler(num_blocks=4, max_num_seqs=2, policy=BackOfTheQueue)
    a, b, c = add(scheduler, "aaaa", "bbbb bbbb", "c")
    step(scheduler)
    assert (a.block_table, b.block_table, free_blocks(scheduler)) == ([0], [1, 2], [3])
    batch = step(scheduler)
    assert ids(batch.preempted) == [1] and batch.admitted == [] and free_blocks(scheduler) == [2, 1]
    assert ids(step(scheduler).admitted) == [2]


# -- Sharing -----------------------------------------------------------------------------------------------------------


def test_a_prompt_that_begins_like_a_running_one_computes_only_the_rest():
    scheduler = make_scheduler(num_blocks=8)
    (a,) = add(scheduler, "aaaa bbbb 1")
    step(scheduler)
    b = make_sequence("aaaa bbbb 22", id=1)
    scheduler.add(b)
    assert shares(step(scheduler)) == [(0, 9, 1), (1, 8, 2)]
    assert (a.block_table, b.block_table, b.num_cached_tokens) == ([0, 1, 2], [0, 1, 3], 8)


def test_a_prompt_is_shared_while_it_is_computed_as_far_as_it_has_come():
    scheduler = make_scheduler(budget=10)
    a, b = add(scheduler, "aaaa bbbb cccc", "aaaa bbbb cccc")
    assert shares(step(scheduler)) == [(0, 0, 10)]
    assert shares(step(scheduler)) == [(0, 10, 2), (1, 8, 4)], "the third block holds b's last token"
    assert (a.block_table, b.block_table) == ([0, 1, 2], [0, 1, 3])


# -- Ends, aborts and failures -----------------------------------------------------------------------------------------


def test_a_waiting_sequence_is_aborted():
    scheduler = make_scheduler(max_num_seqs=1)
    a, b, c = add(scheduler, "a", "b", "c", max_tokens=2)
    step(scheduler)
    scheduler.finish(b, "abort")
    assert b.is_finished and b.finish_reason == "abort" and ids(scheduler.waiting) == [2]
    step(scheduler)
    assert shares(step(scheduler)) == [(2, 0, 1)]


def test_a_running_sequence_is_aborted_and_its_blocks_come_free_at_once():
    scheduler = make_scheduler(num_blocks=4)
    a, b = add(scheduler, "aaaa a", "bbbb b")
    step(scheduler)
    assert free_blocks(scheduler) == []
    scheduler.finish(a, "abort")
    assert free_blocks(scheduler) == [1, 0] and shares(step(scheduler)) == [(1, 5, 1)]
    assert a.row == -1 and len(a.output_token_ids) == 1


def test_blocks_and_row_of_a_sequence_aborted_in_flight_come_free_when_its_step_is_done():
    scheduler = make_scheduler(num_blocks=4)
    a, b = add(scheduler, "aaaa a", "bbbb b")
    batch = scheduler.schedule()
    scheduler.finish(a, "abort")
    assert a.is_finished and free_blocks(scheduler) == [] and len(scheduler.free_rows) == 6
    assert scheduler.update(batch, [7, 8]) == []
    assert free_blocks(scheduler) == [1, 0] and len(scheduler.free_rows) == 7
    assert a.output_token_ids == [] and b.output_token_ids == [8], "its token is dropped, the other's is not"


def test_a_failed_step_is_made_again_in_the_same_order():
    scheduler = make_scheduler(num_blocks=20)
    a, b, c = add(scheduler, "aaaa a", "bbbb b", "cccc c")
    step(scheduler, 7)
    scheduler.fail(scheduler.schedule())
    assert ids(scheduler.waiting) == [0, 1, 2] and not scheduler.running
    assert len(free_blocks(scheduler)) == 20 and len(scheduler.free_rows) == 8
    assert shares(step(scheduler, 8)) == [(0, 0, 6), (1, 0, 6), (2, 0, 6)]
    assert [seq.output_token_ids for seq in (a, b, c)] == [[7, 8]] * 3


def test_a_sequence_aborted_in_a_step_that_fails_leaves_nothing_in_the_cache():
    scheduler = make_scheduler(num_blocks=4)
    (a,) = add(scheduler, "aaaa bbbb")
    batch = scheduler.schedule()
    scheduler.finish(a, "abort")
    scheduler.fail(batch)
    assert not scheduler.has_work() and not scheduler.block_manager.cached and len(free_blocks(scheduler)) == 4
    assert len(scheduler.free_rows) == 8


def test_rows_are_used_again():
    scheduler = make_scheduler(max_num_seqs=2)
    seqs = add(scheduler, "a", "b", "c", "d", max_tokens=1)
    for _ in range(2):
        batch = scheduler.schedule()
        assert sorted(s.seq.row for s in batch.scheduled) == [0, 1]
        scheduler.update(batch, [0, 0])
    assert {seq.row for seq in seqs} == {-1} and sorted(scheduler.free_rows) == [0, 1]


# -- A step planned before the result of the one before it is known ----------------------------------------------------


def test_the_next_step_is_planned_before_a_token_is_known():
    scheduler = make_scheduler()
    (a,) = add(scheduler, "aaaa", max_tokens=3)
    first, second, third = scheduler.schedule(), scheduler.schedule(), scheduler.schedule()
    assert [shares(batch) for batch in (first, second, third)] == [[(0, 0, 4)], [(0, 4, 1)], [(0, 5, 1)]]
    assert shares(scheduler.schedule()) == [], "its last token is in flight already"
    assert [scheduler.update(batch, [token]) for batch, token in ((first, 7), (second, 8), (third, 9))] == [[], [], [a]]
    assert a.output_token_ids == [7, 8, 9]


def test_what_was_planned_after_a_stop_token_is_dropped():
    scheduler = make_scheduler(num_blocks=4)
    a = make_sequence("aaaa", stop=[8])
    scheduler.add(a)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.update(first, [8]) == [a]
    assert a.block_table == [0, 1] and free_blocks(scheduler) == [2, 3], "the second step still writes to its blocks"
    assert scheduler.update(second, [9]) == []
    assert a.output_token_ids == [8] and a.finish_reason == "stop" and free_blocks(scheduler) == [1, 2, 3, 0]


def test_nobody_in_flight_is_preempted_and_who_finds_no_room_sits_a_step_out():
    scheduler = make_scheduler(num_blocks=2)
    a, b = add(scheduler, "aaaa", "bbbb", max_tokens=3)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert shares(second) == [] and second.preempted == [] and b.block_table == [1]
    scheduler.update(first, [7, 8])
    third = scheduler.schedule()
    assert shares(third) == [(0, 4, 1)] and third.preempted == [b] and a.block_table == [0, 1]


def test_nobody_is_admitted_while_one_that_runs_finds_no_room():
    scheduler = make_scheduler(num_blocks=6, budget=10)
    a, b, c, d = add(scheduler, "aaaa", "bbbb", "cccc cccc cccc cccc", "d")
    first, second = scheduler.schedule(), scheduler.schedule()
    assert shares(first) == [(0, 0, 4), (1, 0, 4), (2, 0, 2)]
    assert shares(second) == [(0, 4, 1), (1, 4, 1)] and second.preempted == [], "c needs two blocks, and one is left"
    assert free_blocks(scheduler) == [5] and second.admitted == [], "it would have been enough for d"


def test_two_steps_in_flight_fail():
    scheduler = make_scheduler(num_blocks=8)
    (a,) = add(scheduler, "aaaa bbbb")
    first = scheduler.schedule()
    b = make_sequence("aaaa bbbb c", id=1)
    scheduler.add(b)
    second = scheduler.schedule()
    assert shares(second) == [(0, 8, 1), (1, 8, 1)]
    scheduler.fail(first)
    scheduler.fail(second)
    assert sorted(ids(scheduler.waiting)) == [0, 1] and not scheduler.block_manager.cached
    assert len(free_blocks(scheduler)) == 8 and len(scheduler.free_rows) == 8
    assert [seq.num_in_flight for seq in (a, b)] == [0, 0]


# -- Traps: each was seen in an engine ---------------------------------------------------------------------------------


def test_trap_running_may_exceed_max_num_seqs():
    scheduler = make_scheduler(max_num_seqs=2)
    add(scheduler, "a", "b", "c", "d", "e", max_tokens=3)
    for batch in steps_until(scheduler, lambda: not scheduler.has_work()):
        assert len(batch.scheduled) <= 2 and len(scheduler.running) <= 2


def test_trap_running_may_exceed_max_num_seqs_while_a_finished_one_is_in_flight():
    scheduler = make_scheduler(max_num_seqs=1)
    a, b = add(scheduler, "a", "b")
    batch = scheduler.schedule()
    scheduler.finish(a, "abort")
    assert shares(scheduler.schedule()) == [], "the device still works on a's row"
    scheduler.update(batch, [0])
    assert shares(scheduler.schedule()) == [(1, 0, 1)]


def test_trap_a_prompt_larger_than_the_cache_kills_the_batch():
    scheduler = make_scheduler(num_blocks=4)
    (a,) = add(scheduler, "aaaa", max_tokens=4)
    with pytest.raises(ValueError, match=r"grow to 18 tokens .* needs 5 KV cache blocks of 4 tokens.* only 4"):
        scheduler.add(make_sequence("bbbb" * 4, max_tokens=2, id=1))
    assert ids(scheduler.waiting) == [0]
    run_to_the_end(scheduler)
    assert len(a.output_token_ids) == 4


def test_a_sequence_that_fills_the_cache_to_the_last_slot_is_taken():
    scheduler = make_scheduler(num_blocks=4)
    (a,) = add(scheduler, "aaaa" * 4, max_tokens=1)
    run_to_the_end(scheduler)
    (b,) = add(scheduler, "b", max_tokens=16)  # its seventeenth token is not fed back
    run_to_the_end(scheduler)
    assert len(a.output_token_ids) == 1 and len(b.output_token_ids) == 16


def test_trap_prompt_and_max_tokens_grow_past_the_longest_length():
    scheduler = make_scheduler()
    a = Sequence(0, tokens("aaaa"), SamplingParams(max_tokens=100), max_num_tokens=6)
    scheduler.add(a)
    run_to_the_end(scheduler)
    assert len(a.token_ids) == 6 and a.finish_reason == "length"


def test_trap_max_tokens_0():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, not 0"):
        SamplingParams(max_tokens=0)


def test_trap_decode_starved_while_prompts_keep_arriving():
    scheduler = make_scheduler(budget=6, num_blocks=1000)
    a = make_sequence("a", max_tokens=50)
    scheduler.add(a)
    others = [make_sequence([i] * 20, id=i) for i in range(1, 51)]
    for other in others:
        scheduler.add(other)
        assert a in [s.seq for s in step(scheduler).scheduled]
    assert len(a.output_token_ids) == 50 and others[0].is_finished


def test_trap_identical_prompts_in_one_batch_share_nothing():
    scheduler = make_scheduler(num_blocks=8)
    a, b, c = add(scheduler, *["aaaa bbbb c"] * 3)
    assert shares(step(scheduler)) == [(0, 0, 9), (1, 8, 1), (2, 8, 1)]
    assert [seq.block_table for seq in (a, b, c)] == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    assert [block.ref_count for block in scheduler.block_manager.blocks] == [3, 3, 1, 1, 1, 0, 0, 0]


def test_trap_fully_cached_block_aligned_prompt():
    scheduler = make_scheduler(num_blocks=8)
    a, b = add(scheduler, "aaaa bbbb", "aaaa bbbb")
    assert shares(step(scheduler)) == [(0, 0, 8), (1, 4, 4)]
    assert len(b.output_token_ids) == 1
    assert (a.block_table, b.block_table) == ([0, 1], [0, 2]), "a's second block is not written a second time"


def test_trap_head_of_line_prompt_is_hashed_every_step(monkeypatch):
    calls = []
    monkeypatch.setattr(block_manager, "hash_block", lambda *args: calls.append(args) or hash_block(*args))
    scheduler = make_scheduler(num_blocks=12)
    a = make_sequence("aaaa aaaa aaaa", max_tokens=20)
    b = make_sequence("aaaa aaaa" + 10 * "bbbb", max_tokens=1)
    scheduler.add(a), scheduler.add(b)
    for _ in range(10):
        step(scheduler)
    assert b.status is Status.WAITING
    assert (
        len(calls) == 3 + 2 + 3
    ), "three blocks of a, two that it generated; two that b finds, and one that it does not"


def test_trap_blocks_stay_in_the_cache_although_their_step_failed():
    scheduler = make_scheduler()
    a, b = add(scheduler, "aaaa bbbb 1", "aaaa bbbb 2")
    scheduler.fail(scheduler.schedule())
    assert not scheduler.block_manager.cached
    assert shares(scheduler.schedule()) == [(0, 0, 9), (1, 8, 1)], "computed again, and then shared"


# -- Random runs -------------------------------------------------------------------------------------------------------


class Run:
    """A scheduler and a machine under random requests, aborts and failures, looked over after every operation.

    With `lag`, a step is planned and launched before the result of the one before it is taken in.
    """

    def __init__(self, seed: int, lag: int, events: Counter[str], monkeypatch) -> None:
        self.random, self.lag, self.events = Random(seed), lag, events
        random = self.random
        block_size, num_blocks = random.randint(1, 4), random.randint(5, 14)
        self.scheduler = make_scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=random.randint(1, 8),
            budget=random.choice([1, 4, 10, 30, 30]),
            caching=random.random() < 0.9,
        )
        self.blocks = self.scheduler.block_manager
        self.machine = Machine(num_blocks, block_size, self.scheduler.max_num_seqs)
        self.num_hashes = random.choice([1, 10, None, None, None, None])  # None: as many as there are
        monkeypatch.setattr(block_manager, "hash_block", self.hash_block)
        self.num_hashed = self.most_hashes = 0

        self.num_seqs = 0
        self.seqs: list[Sequence] = []
        self.alone: dict[Sequence, tuple[list[int], list[int]]] = {}  # how each must come out
        self.in_flight: deque[tuple[Batch, list[int] | None]] = deque()  # None: the step will fail
        self.contents: dict[int, list[int]] = {}  # serial number of a cached content -> what the machine has there
        self.ends: dict[int | str, int | str | None] = {"": None, "salt": "salt"}  # and which prefix ends with it
        self.evicted: set[int] = set()  # blocks whose place was needed
        self.has_failed = False

    @property
    def unfinished(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def hash_block(self, parent: int | str, tokens: bytes) -> int:
        self.num_hashed += 1
        if self.num_hashes is None:
            return hash_block(parent, tokens)
        value = sum(tokens) % self.num_hashes
        there = self.blocks.cached.get(value)
        self.events["forced collision"] += there is not None and self.blocks.blocks[there].tokens != tokens
        return value

    # -- Operations

    def operate(self) -> None:
        """One operation: most often a step, its launch or its result."""
        scheduler = self.scheduler
        kind = self.random.choices(["add", "abort", "step"], [15, 4, 81])[0]
        if kind == "add" and len(scheduler.waiting) < 4:
            prompt = self.random.choice([[0] * 12, [1, 2] * 5, [0] * 4 + [3] * 4])[: self.random.randint(3, 12)]
            for _ in range(self.random.choice([1, 4, 6])):
                self.add(prompt + self.random.choice([[], [], [4], [self.random.randrange(VOCAB_SIZE)]]))
        elif kind == "abort" and self.unfinished:
            queue = self.random.choice([scheduler.running, scheduler.waiting]) or self.unfinished
            self.abort(self.random.choice(queue))
        elif len(self.in_flight) > self.lag or (self.in_flight and self.random.random() < 0.2):
            self.take_in()
        else:
            self.launch()
        self.check()

    def add(self, prompt: list[int]) -> None:
        random, size = self.random, self.blocks.block_size
        stop = [random.randrange(VOCAB_SIZE)] if random.random() < 0.2 else []
        salt = random.choice([None, None, None, "salt"])
        seq = make_sequence(prompt, random.randint(1, 16), self.num_seqs, salt, stop)
        if -(-(seq.max_num_tokens - 1) // size) > self.blocks.num_blocks:
            with pytest.raises(ValueError, match=f"only {self.blocks.num_blocks}"):
                self.scheduler.add(seq)
            return
        self.scheduler.add(seq)
        self.seqs.append(seq)
        self.num_seqs += 1
        self.most_hashes += seq.max_num_tokens // size
        self.alone[seq] = self.machine.alone(seq)

    def abort(self, seq: Sequence) -> None:
        self.events["abort"] += 1
        self.events[f"abort {'in flight' if seq.num_in_flight else seq.status.value}"] += 1
        self.scheduler.finish(seq, "abort")

    def launch(self) -> None:
        running, waiting = list(self.scheduler.running), list(self.scheduler.waiting)
        cached = {block_id: self.blocks.blocks[block_id].serial for block_id in self.blocks.cached.values()}
        held = {block_id for seq in self.seqs for block_id in seq.block_table}
        rows = {seq: seq.row for seq in self.seqs if seq.row >= 0}

        batch = self.scheduler.schedule()
        self.check_plan(batch, running, waiting)
        self.note_events(batch, cached, held)
        assert all(seq.row == row for seq, row in rows.items() if seq not in batch.preempted)

        is_poisoned = any(token_ids is None for _, token_ids in self.in_flight)
        if not batch.scheduled:
            return
        if is_poisoned or self.random.random() < 0.06:
            self.machine.run_badly(batch)
            self.in_flight.append((batch, None))
            return
        contexts = self.machine.run(batch)
        for seq, context in contexts:
            assert context == self.alone[seq][1][: len(context)], f"{seq} reads what is not its own"
        samples = [s.samples for s in batch.scheduled]
        self.in_flight.append((batch, [self.machine.next_token(c) for (_, c), s in zip(contexts, samples) if s]))

    def take_in(self) -> None:
        batch, token_ids = self.in_flight.popleft()
        if token_ids is not None:
            before = {s.seq: s.seq.is_finished for s in batch.scheduled}
            finished = self.scheduler.update(batch, token_ids)
            assert finished == [s.seq for s in batch.scheduled if s.seq.is_finished and not before[s.seq]]
            self.events["surplus token"] += sum(before.values())
            return
        failed = [batch] + [later for later, _ in self.in_flight]  # those after it had its results to work on
        self.in_flight.clear()
        for batch in failed if self.random.random() < 0.5 else failed[::-1]:
            self.scheduler.fail(batch)
        self.events["failed step"] += 1
        self.has_failed = True

    # -- Checks

    def check_plan(self, batch: Batch, running: list[Sequence], waiting: list[Sequence]) -> None:
        scheduler, scheduled = self.scheduler, [s.seq for s in batch.scheduled]
        assert batch.num_tokens <= scheduler.max_num_batched_tokens
        assert all(s.num_new_tokens > 0 for s in batch.scheduled) and len(set(scheduled)) == len(scheduled)
        ends = [s.num_computed_tokens + s.num_new_tokens for s in batch.scheduled]
        assert all(end < seq.max_num_tokens for end, seq in zip(ends, scheduled)), "the last token is not fed back"
        assert all(seq in scheduler.running for seq in scheduled)
        assert batch.preempted == running[len(running) - len(batch.preempted) :][::-1], "the last admitted first"
        assert batch.admitted == waiting[: len(batch.admitted)] and not (batch.admitted and batch.preempted)
        survivors = running[: len(running) - len(batch.preempted)]
        assert scheduler.running == survivors + batch.admitted
        assert not any(seq.num_in_flight for seq in batch.preempted)
        if self.in_flight:
            return  # some may sit this step out
        assert scheduled == survivors + batch.admitted, "whoever runs takes part, so that nobody starves"
        assert batch.preempted or scheduled or not self.unfinished, "there was something to do"
        assert scheduled[:1] == running[:1] or not running, "the oldest goes on"
        num_left = scheduler.max_num_batched_tokens - batch.num_tokens
        if scheduler.waiting and scheduler.free_rows and num_left and not batch.preempted:
            hits = self.blocks.find(scheduler.waiting[0])
            needed = -(-len(scheduler.waiting[0].token_ids) // self.blocks.block_size)
            room = set(self.blocks.free) | set(hits)
            assert needed > len(room), "whoever waits would not have fitted"

    def note_events(self, batch: Batch, cached: dict[int, int], held: set[int]) -> None:
        written: set[int] = set()
        for s in batch.scheduled:
            table, size = s.seq.block_table, self.blocks.block_size
            hits = table[: s.num_computed_tokens // size] if s.seq in batch.admitted else []
            self.events["share"] += len(hits)
            self.events["same-step sharing"] += len(written.intersection(hits))
            self.events["reuse of an evicted block"] += len(self.evicted.intersection(hits))
            new = set(table[-(-s.num_computed_tokens // size) :])
            evicted = {block_id for block_id in new - held if block_id in cached}
            self.events["evict"] += len(evicted)
            self.evicted |= evicted
            written |= new
            self.events["chunked prefill"] += not s.samples
        self.events["preempt"] += len(batch.preempted)
        self.events["mixed step"] += len({s.num_new_tokens > 1 for s in batch.scheduled}) == 2

    def check(self) -> None:
        scheduler, blocks = self.scheduler, self.blocks
        # Blocks: what the block tables say is what the counts say, and what is in no table is free.
        tables = Counter(block_id for seq in self.seqs for block_id in seq.block_table)
        assert [block.ref_count for block in blocks.blocks] == [tables[i] for i in range(blocks.num_blocks)]
        assert sorted([*tables, *blocks.free]) == list(range(blocks.num_blocks))
        assert {i: h for h, i in blocks.cached.items()} == {
            i: block.hash for i, block in enumerate(blocks.blocks) if block.hash is not None
        }
        is_cached = [blocks.blocks[block_id].hash is not None for block_id in blocks.free]
        assert is_cached == sorted(is_cached), "free blocks that hold nothing are taken first"

        # The cache: a block holds what the cache says that it holds, all of it and in this order.
        if not any(token_ids is None for _, token_ids in self.in_flight):
            for block_id in blocks.cached.values():
                block, slots = blocks.blocks[block_id], self.machine.memory[block_id]
                if block.serial not in self.contents:
                    assert GARBAGE not in slots, "what a failed step left is in the cache"
                    origins = [self.machine.origins[slot] for slot in slots]
                    assert array("q", [token_id for _, token_id in origins]).tobytes() == block.tokens
                    assert [before for before, _ in origins][1:] == slots[:-1]
                    assert self.ends.setdefault(block.parent, origins[0][0]) == origins[0][0]
                    assert self.ends.setdefault(block.serial, slots[-1]) == slots[-1]
                    self.contents[block.serial] = list(slots)
                assert slots == self.contents[block.serial], "a cached block was written to"

        # Sequences: those that wait hold nothing, those that run a row each.
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert all(seq.status is Status.RUNNING and seq.row >= 0 for seq in scheduler.running)
        assert all(seq.status is Status.WAITING and seq.row < 0 and not seq.block_table for seq in scheduler.waiting)
        rows = [seq.row for seq in self.seqs if seq.row >= 0]
        assert sorted(rows + scheduler.free_rows) == list(range(scheduler.max_num_seqs))
        if not (self.lag and self.has_failed):
            assert ids(self.unfinished) == sorted(ids(self.unfinished)), "first come, first served"
        in_flight = [s for batch, _ in self.in_flight for s in batch.scheduled]
        num_in_flight, num_samples = Counter(s.seq for s in in_flight), Counter(s.seq for s in in_flight if s.samples)
        for seq in self.seqs:
            assert seq.num_in_flight == num_in_flight[seq]
            assert seq.is_finished or seq.num_tokens == len(seq.token_ids) + num_samples[seq]
            if seq.is_finished and not seq.num_in_flight:
                assert not seq.block_table and seq.row == -1
        self.check_answers()

    def check_answers(self) -> None:
        """Tokens are those that come out alone; an answer ends at its stop token or its length, and only there."""
        for seq in [seq for seq in self.seqs if seq.is_finished and not seq.num_in_flight]:
            expected = self.alone.pop(seq)[0]
            self.seqs.remove(seq)
            num_tokens = next(
                (i + 1 for i in range(seq.num_prompt_tokens, len(expected)) if expected[i] in seq.stop_token_ids),
                len(expected),
            )
            assert seq.token_ids.tolist() == expected[: len(seq.token_ids)]
            if seq.finish_reason == "abort":
                assert len(seq.token_ids) <= num_tokens
            else:
                assert len(seq.token_ids) == num_tokens
                assert seq.finish_reason == ("stop" if expected[num_tokens - 1] in seq.stop_token_ids else "length")
            self.events["finished"] += 1

    def finish(self) -> int:
        """Let everything come to its end. Returns how many operations that took."""
        num_operations = 0
        while self.scheduler.has_work() or self.in_flight:
            if len(self.in_flight) > self.lag or not self.scheduler.has_work():
                self.take_in()
            elif not self.in_flight or self.random.random() < 0.8:
                self.launch()
            else:
                self.take_in()
            self.check()
            num_operations += 1
            assert num_operations < 2000, "it does not come to an end"
        assert not self.seqs and len(self.blocks.free) == self.blocks.num_blocks
        assert len(self.scheduler.free_rows) == self.scheduler.max_num_seqs
        assert self.num_hashed <= self.most_hashes, "a block was hashed more than once"
        return num_operations


KINDS = [
    "share",
    "evict",
    "preempt",
    "abort",
    "same-step sharing",
    "forced collision",
    "reuse of an evicted block",
    "failed step",
    "chunked prefill",
    "mixed step",
    "finished",
]


@pytest.mark.parametrize("lag", [0, 1], ids=["results in time", "results one step late"])
def test_70_000_random_operations(lag, monkeypatch):
    events = Counter[str]()
    num_operations = seed = 0
    while num_operations < 70_000:
        with monkeypatch.context() as patch:
            run = Run(seed, lag, events, patch)
            for _ in range(200):
                run.operate()
            num_operations += 200 + run.finish()
        seed += 1
    kinds = KINDS + (["surplus token"] if lag else [])
    assert min(events[kind] for kind in kinds) >= 1000, events
    assert all(events[f"abort {where}"] >= 50 for where in ("waiting", "running", "in flight")), events
