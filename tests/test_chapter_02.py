"""What chapter 02 shares: the look into attention, the maps of slots, the exercise checks on wrong answers."""

import random

import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.kernels import torch_attention
from nanovllm.lessons.chapter_02 import (
    SharedPool,
    alone,
    append,
    blocks_as_slots,
    draw_programs,
    draw_slots,
    made_up_decodes,
    make_sequence,
    slot_map,
    watch_attention,
    what_programs_read,
)
from nanovllm.lessons.series import NOTEBOOKS
from nanovllm.lessons.tiny import tiny_llm
from tests.test_notebooks import check_told, exercises, read, recorded_benchmark

CHAPTER = NOTEBOOKS / "02_paged_attention.ipynb"

# -- A look into attention ---------------------------------------------------------------------------------------------


def test_watch_attention_keeps_what_each_step_gave_and_got():
    llm = tiny_llm(num_kv_blocks=8, block_size=4)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with watch_attention(llm, layer=1) as calls:
        llm.generate([[5, 6, 7, 8, 9], [3]], params, use_tqdm=False)
    assert [list(call.query.shape) for call in calls] == [[6, 4, 16], [2, 4, 16], [2, 4, 16]]
    assert [call.context.slot_mapping.tolist() for call in calls] == [[8, 0, 1, 2, 3, 4], [5, 9], [6, 10]]
    for call in calls:
        cache = call.k_cache.flatten(0, 1)
        assert torch.equal(cache[call.context.slot_mapping], call.key)
        assert call.output.shape == call.query.shape and call.scale == 0.25
    assert not torch.equal(calls[0].k_cache, calls[1].k_cache)  # copies: later steps do not change them
    llm.generate([[5]], params, use_tqdm=False)
    assert len(calls) == 3


def test_made_up_decodes_alone_and_together():
    call = made_up_decodes([100, 20, 16])
    assert call.context.context_lens.tolist() == [100, 20, 16] and len(call.k_cache) == 7 + 2 + 1
    assert torch.equal(call.k_cache.flatten(0, 1)[call.context.slot_mapping], call.key)
    for i in range(3):
        one = alone(call, i)
        one.context.plan = torch_attention.plan(one.context, one.k_cache)
        output = torch_attention.attend(one.query, one.k_cache, one.v_cache, one.context, one.scale)
        torch.testing.assert_close(output, call.output[i : i + 1])


def test_what_programs_read():
    call = made_up_decodes([20, 5])
    first, second = call.context.block_tables[0].tolist()
    other, _ = call.context.block_tables[1].tolist()
    reads = {(0, 1, 0): [other * 16 + i for i in range(5)], (0, 0, 1): [second * 16 + i for i in range(4)]}
    assert what_programs_read(call, reads, "EF") == {(0, 0, 1): ("E", range(16, 20)), (0, 1, 0): ("F", range(5))}
    with pytest.raises(AssertionError):
        what_programs_read(call, {(0, 0, 0): [first * 16, other * 16]}, "EF")


def test_what_the_kernel_is_worth_on_a_gpu():
    """The figures of the text are those of the recording, and of docs/performance.md."""
    bench = recorded_benchmark()
    decode = 1000 * bench["decode step, batch 256"]["by_kind_ms"]["attention"] / 28
    floor = 2 * 256 * 1024 * 8 * 128 * 2 / bench["copy, read and written"]["value"] / 1000
    one, many = (bench[f"prefill attention, triton, {size}"]["value"] for size in ("1 x 8192", "16 x 1024"))
    seconds = 4 * 8192 * 8193 / 2 * 16 * 128 / one / 1e12
    product = bench["matrix product"]["value"]
    text = " ".join(next(cell.source for cell in read(CHAPTER).cells if cell.id == "deeper-source-end").split())
    for said in (
        f"takes {decode:.0f} µs, inside a step",
        f"the other half, {floor:.0f} µs would do",
        f"takes {1e6 * seconds:.0f} µs. That is {one:.0f} TFLOP/s",
        f"a large matrix product reaches {product:.0f}.",
        f"our kernel reaches {many:.0f} TFLOP/s",
    ):
        assert said in text
    measured = (NOTEBOOKS.parent / "docs/performance.md").read_text()
    assert "665 instead of 747 for one prompt" in measured and "385 TFLOP/s with 16 × 1,024 tokens" in measured


def test_a_box_is_drawn_for_each_program():
    left, right = draw_programs({"one": {"A": [range(3)]}, "two": {"E, x": [range(9), range(9, 12)]}}).axes
    assert [len(ax.patches) for ax in (left, right)] == [1, 2] and right.get_xlim() == (0, 12)


# -- Maps of slots -----------------------------------------------------------------------------------------------------


def test_slot_map():
    slots = {"A": range(0, 6), "B": [10, 11, 8, 9]}
    assert slot_map(slots, stored={"A": 2, "B": 3}, final={"A": 4, "B": 4}, num_slots=13) == "AAaaxx..BbBB."


def test_slots_of_blocks():
    llm = tiny_llm(num_kv_blocks=8, block_size=2)
    with llm.trace() as trace:
        llm.generate([[5, 6, 7], [3]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert blocks_as_slots(trace, 0, {0: "A", 1: "B"}) == {"A": [0, 1, 2, 3], "B": [4, 5]}


def test_a_row_is_drawn_for_each_map():
    figure = draw_slots({"first": "AAaaxx..", "second": "BBbb...."})
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["first", "second"]
    assert figure.axes[0].get_xlim() == (0, 8)


# -- Exercises ---------------------------------------------------------------------------------------------------------


def test_append_copies_only_what_is_shared():
    pool = SharedPool(num_blocks=8, block_size=4)
    tables = pool.three([1, 2, 3, 4, 5])
    append(pool, tables["B"], 5, 60)
    assert tables == {"A": [0, 1], "B": [0, 2], "C": [0, 1]} and pool.ref_count[:3] == [3, 2, 1]
    append(pool, tables["A"], 5, 61)
    append(pool, tables["C"], 5, 62)  # the last holder needs no copy
    assert tables == {"A": [0, 3], "B": [0, 2], "C": [0, 1]} and pool.ref_count[:4] == [3, 1, 1, 1]
    assert [pool.read(tables[name], 6)[-2:] for name in "ABC"] == [[5, 61], [5, 60], [5, 62]]


COPYING = """def append(pool, block_table, position, token):
    index, offset = position // pool.block_size, position % pool.block_size
    if index == len(block_table):
        block_table.append(pool.take())
    elif {condition}:
        shared, mine = block_table[index], pool.take()
        {copy}
        {count}
        block_table[index] = mine
    pool.contents[block_table[index]][offset] = token"""
IS_SHARED = "pool.ref_count[block_table[index]] > 1"
COPY = "pool.contents[mine] = list(pool.contents[shared])"
COUNT = "pool.ref_count[shared] -= 1"

WRONG = [
    (1, "def slots_of_step(table, computed, new, size):\n"
        "    return list(range(computed, computed + new))", "The block table says where they lie"),
    (1, "def slots_of_step(table, computed, new, size):\n"
        "    return [table[p // size] * size + p % size for p in range(new)]", "token stands at position 33"),
    (1, "def slots_of_step(table, computed, new, size):\n"
        "    return [table[p // size] * size + p % size for p in range(computed + new)]", "for each *new*"),
    (1, "def slots_of_step(table, computed, new, size):\n"
        "    return [table[p // size] + p % size for p in range(computed, computed + new)]", "the engine writes to"),
    (2, "def waste(stored, size):\n"
        "    return 1 - sum(stored) / sum((n // size + 1) * size for n in stored)", "needs no other"),
    (2, "def waste(stored, size):\n"
        "    return sum(-n % size for n in stored)", "divide by all slots that are held"),
    (2, "def waste(stored, size):\n"
        "    return sum(-n % size for n in stored) / sum(stored)", "the share is 0.227"),
    (3, COPYING.format(condition="False", copy=COPY, count=COUNT), "must not write to a block that"),
    (3, COPYING.format(condition=IS_SHARED, copy="pass", count=COUNT), "Is the content copied"),
    (3, COPYING.format(condition=IS_SHARED, copy=COPY, count="pass"), "does not hold the old block any longer"),
    (3, COPYING.format(condition="True", copy=COPY, count=COUNT), "Copy only what somebody else reads"),
    (4, "class Reserving(Scheduler):\n"
        "    pass", "is preempted"),
    (4, "class Reserving(Scheduler):\n"
        "    def _admit(self, seq):\n"
        "        return not self.running and super()._admit(seq)", "waits, although"),
    (4, "class Reserving(Scheduler):\n"
        "    def _admit(self, seq):\n"
        "        blocks = self.block_manager\n"
        "        needed = sum(blocks.num_blocks_for(s.max_num_tokens) for s in [*self.running, seq])\n"
        "        return needed <= blocks.num_blocks and super()._admit(seq)", "never stored"),
    (4, "class Reserving(Scheduler):\n"
        "    def _admit(self, seq):\n"
        "        return False", "wait for ever"),
    (4, "Reserving = 3", "Give the class"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "answer", "words"), WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(number, answer, words):
    check_told(CHAPTER, number, answer, words)


def test_what_reserving_costs_on_the_benchmark():
    """The figures in the text of exercise 4."""
    draw = random.Random(0)  # the benchmark's lengths; the token ids are drawn and dropped
    prompt_lens = [len([draw.randint(0, 10000) for _ in range(draw.randint(100, 1024))]) for _ in range(256)]
    lengths = [(prompt_len, draw.randint(100, 1024)) for prompt_len in prompt_lens]
    namespace = {"Scheduler": Scheduler}
    exec(exercises(CHAPTER)[4][1], namespace)
    num_steps = {Scheduler: 0, namespace["Reserving"]: 0}
    for policy in num_steps:
        scheduler = policy(Config(max_num_batched_tokens=65_535), BlockManager(4096, 16, enable_prefix_caching=False))
        for i, (prompt_len, answer_len) in enumerate(lengths):
            scheduler.add(make_sequence(i, prompt_len, answer_len))
        while scheduler.has_work():
            batch = scheduler.schedule()
            scheduler.update(batch, [7] * sum(s.samples for s in batch.scheduled))
            num_steps[policy] += 1
    assert list(num_steps.values()) == [2513, 3231]
    text = next(cell.source for cell in read(CHAPTER).cells if cell.id == "exercise-4-text")
    assert "3,231 steps in place of 2,513" in " ".join(text.split())
