"""What chapter 03 shares: its pictures, its customers, the exercise checks on wrong answers."""

import random

import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.lessons.chapter_03 import (
    CacheAware,
    admit,
    draw_differences,
    draw_turns,
    make_sequence,
    queue_at,
    serve,
    serve_customers,
    tokens_to_compute,
    turns_of,
    turns_text,
    wait,
)
from nanovllm.lessons.series import NOTEBOOKS
from nanovllm.lessons.tiny import tiny_llm
from nanovllm.viz.frames import Frames
from tests.test_notebooks import check_told, read, verdict

CHAPTER = NOTEBOOKS / "03_prefix_caching.ipynb"

# -- The reader's cache ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chapter() -> dict:
    """The chapter's `chain`, `PrefixCache` and `replay`, without the runs around them."""
    sources = {cell.id: cell.source for cell in read(CHAPTER).cells}
    namespace: dict = {"queue_at": queue_at, "tokens": {"A": [], "C": []}, "trace": None}
    exec("from array import array\nfrom xxhash import xxh64_intdigest", namespace)
    for id, upto in (
        ("chain", "greedy ="),
        ("sharing-class", "print("),
        ("sharing", "cache ="),
        ("evict-class", "cache ="),
        ("replay", "print("),
    ):
        code, found, _ = sources[id].partition(f"\n\n\n{upto}")
        assert found
        exec(compile(code, id, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("seed", range(30))
def test_the_readers_cache_is_the_engines_on_random_runs(chapter, seed):
    """Also where prompts are equal, which those of the chapter never are."""
    draw = random.Random(1000 + seed)
    llm = tiny_llm(num_kv_blocks=draw.randint(6, 12), block_size=4, max_num_seqs=4)
    beginnings = [[draw.randrange(2, 500) for _ in range(draw.randint(1, 12))] for _ in range(3)]
    prompts = [draw.choice(beginnings) + [draw.randrange(2, 500) for _ in range(draw.randint(0, 3))] for _ in range(12)]
    params = [SamplingParams(max_tokens=draw.randint(1, 8), ignore_eos=True, seed=i) for i in range(12)]
    with llm.trace() as trace:
        llm.generate(prompts, params, use_tqdm=False)
    llm.close()
    chapter["replay"](trace)


def test_where_the_readers_cache_and_the_engine_part(chapter):
    """A repeated prompt goes on behind a block that is not entered: its child is kept when the parent is evicted."""
    mine, engine, seqs = chapter["PrefixCache"](8, 4), BlockManager(8, 4), {}

    def comes(name, tokens):
        seqs[name] = make_sequence(0, tokens)
        chapter["admit"](mine, name, tokens)
        admit(engine, seqs[name])

    def goes(name):
        mine.release(name)
        engine.release(seqs[name])

    prompt, answer = list(range(10, 18)), [20, 21, 22, 23]
    comes("first", prompt)
    goes("first")
    comes("again", prompt)  # finds its first block, computes the second once more, and goes on behind it
    mine.grow("again", 12)
    mine.enter("again", prompt + answer, 8)
    seqs["again"].token_ids.extend(answer)
    assert engine.allocate(seqs["again"], 12)
    engine.fill(seqs["again"], 4)
    comes("stranger", list(range(50, 70)))  # takes the place of the first one's second block
    goes("stranger")
    goes("again")
    comes("third", prompt)
    goes("third")
    hits = mine.look_up([*prompt, *answer, 30])
    found = engine.find(make_sequence(0, [*prompt, *answer, 30]))
    assert found == hits[:2] and len(hits) == 3


# -- What the chapter draws and counts ---------------------------------------------------------------------------------


def test_a_cell_is_drawn_for_each_key_that_differs():
    differs = torch.zeros(3, 4, dtype=torch.bool)
    differs[1, 2:] = True
    figure = draw_differences({"first": differs, "second": ~differs})
    boxes = [[patch.get_xy() for patch in ax.patches] for ax in figure.axes]
    assert boxes[0] == [(2, 1), (3, 1)] and len(boxes[1]) == 10
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["first", "second"]


@pytest.fixture(scope="module")
def frames() -> Frames:
    """Two people in a pool with room for one of them."""
    llm = tiny_llm(num_kv_blocks=2, block_size=4)
    with llm.trace() as trace:
        for token in (5, 5, 6, 5):
            params = SamplingParams(max_tokens=2, ignore_eos=True)
            llm.generate([[token] * 5], params, use_tqdm=False)
    llm.close()
    return Frames(trace, names=dict(zip(trace.requests, "AABA")))


def test_turns(frames):
    assert [(t.name, t.num_cached_tokens, t.evicted, t.holds) for t in turns_of(frames)] == [
        ("A", 0, [], {0: "A"}),
        ("A", 4, [], {0: "A"}),
        ("B", 0, ["A"], {1: "B"}),
        ("A", 0, ["B"], {0: "A"}),
    ]
    assert turns_text({"Two people": frames}).splitlines() == [
        "Two people",
        "came      A  A  B  A",
        "evicted   .  .  A  B",
        "found     0  4  0  0",
    ]


def test_new_content_has_an_outline(frames):
    (ax,) = draw_turns({"Two people": frames}).axes
    assert ax.get_title(loc="left") == "Two people: 1 of 4 find something"
    bold = [(int(p.get_x()), int(p.get_y())) for p in ax.patches if p.get_linewidth() > 2]
    assert bold == [(0, 0), (2, 1), (3, 0)]


def test_queue_at():
    llm = tiny_llm(num_kv_blocks=4, block_size=2)
    with llm.trace() as trace:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
    assert queue_at(trace, 0) == list(llm.engine.block_manager.free) == [1, 2, 3, 0]


def test_customers_in_a_pool_with_room_for_all():
    """Everybody but the first of each service finds the full blocks of the system prompt."""
    for order in ("one after another", "in turn", "shuffled"):
        assert serve_customers(100, 16, order, 65_536) == (20 * 96, 24 * 120)
    assert serve_customers(100, 128, "in turn", 65_536)[0] == 0


def test_the_orders_that_the_chapter_tells_of():
    found = {order: serve_customers(300, 16, order, 1024)[0] for order in ("one after another", "in turn", "shuffled")}
    assert found["in turn"] < found["shuffled"] < found["one after another"]


def test_serve_tells_who_is_left():
    class Lazy(Scheduler):
        def schedule(self):
            self.waiting.clear()
            return super().schedule()

    prompts = [[1] * 33, [1] * 33]
    assert serve(Scheduler, prompts, BlockManager(5, 16)) == (32, 0)
    assert serve(Lazy, prompts, BlockManager(5, 16)) == (0, 2)


def test_cache_aware_finds_each_beginning_as_long_as_it_is_there():
    prompts = [[i % 2] * 32 + [100 + i] for i in range(8)]
    assert serve(Scheduler, prompts, BlockManager(3, 16))[0] == 0
    assert serve(CacheAware, prompts, BlockManager(3, 16))[0] == 6 * 32


@pytest.mark.parametrize(("shape", "right"), [((27, 22, 16), 11), ((32, 32, 16), 16), ((33, 33, 16), 1)])
def test_tokens_to_compute(shape, right):
    num_tokens, num_shared, block_size = shape
    assert tokens_to_compute(num_tokens, num_shared, block_size) == right
    llm = tiny_llm(num_kv_blocks=16, block_size=block_size)  # and the engine with a model agrees
    shared = [7] * num_shared
    wait(llm, shared + [8])
    assert wait(llm, shared + [9] * (num_tokens - num_shared)) == 2 * right


def test_make_sequence():
    seq = make_sequence(3, [1, 2], salt="red")
    assert (seq.id, seq.prompt_token_ids, seq.max_num_tokens, seq.params.cache_salt) == (3, [1, 2], 3, "red")


# -- Exercises ---------------------------------------------------------------------------------------------------------

WRONG = [
    (1, "def tokens_to_compute(num_tokens, num_shared, block_size):\n"
        "    return num_tokens - num_shared", "whole blocks only"),
    (1, "def tokens_to_compute(num_tokens, num_shared, block_size):\n"
        "    return num_tokens - num_shared // block_size * block_size", "the last token is always computed"),
    (1, "def tokens_to_compute(num_tokens, num_shared, block_size):\n"
        "    return max(1, num_tokens - num_shared // block_size * block_size)", "the engine computes 16 tokens"),
    (1, "def tokens_to_compute(num_tokens, num_shared, block_size):\n"
        "    return num_tokens - max(num_shared - 1, 0) // block_size * block_size",
        "not the last of those they share"),
    (2, "def holds(block, parent, tokens):\n"
        "    return True", "gets the block of the tokens"),
    (2, "def holds(block, parent, tokens):\n"
        "    return block.tokens == tokens", "Compare the parent, too"),
    (2, "def holds(block, parent, tokens):\n"
        "    return block.parent == parent", "gets the block of the tokens"),
    (2, "def holds(block, parent, tokens):\n"
        "    return False", "a block could be shared, and you allow it in 0"),
    (3, "def spy(wait, candidates):\n"
        "    return 0", "Which one is faster than all others?"),
    (3, "def spy(wait, candidates):\n"
        "    times = [wait(prompt) for prompt in candidates]\n"
        "    return times.index(max(times))", "Which one is faster than all others?"),
    (3, "def spy(wait, candidates):\n"
        "    times = [wait(prompt) for prompt in candidates]\n"
        "    return times.index(min(times))", "return None then"),
    (3, "def spy(wait, candidates):\n"
        "    return min(candidates, key=wait)", "return its index"),
    (3, "def spy(wait, candidates):\n"
        "    times = [wait(prompt) for prompt in candidates]\n"
        "    return None if times[0] > max(times[1:]) else times.index(min(times))", "none of the five"),
    (3, "def spy(wait, candidates):\n"
        "    return None", "Which one is faster than all others?"),
    (4, "class CacheAware(Scheduler):\n"
        "    pass", "goes first"),
    (4, "class CacheAware(Scheduler):\n"
        "    def schedule(self):\n"
        "        if len(self.waiting) == 24:\n"
        "            by_hits = sorted(self.waiting, key=lambda seq: -len(self.block_manager.find(seq)))\n"
        "            self.waiting.clear()\n"
        "            self.waiting.extend(by_hits)\n"
        "        return super().schedule()", "Look anew in every step"),
    (4, "class CacheAware(Scheduler):\n"
        "    def schedule(self):\n"
        "        by_text = sorted(self.waiting, key=lambda seq: seq.token_ids)\n"
        "        self.waiting.clear()\n"
        "        self.waiting.extend(by_text)\n"
        "        return super().schedule()", "the first one, too"),
    (4, "class CacheAware(Scheduler):\n"
        "    def schedule(self):\n"
        "        found = [seq for seq in self.waiting if self.block_manager.find(seq)]\n"
        "        if found:\n"
        "            self.waiting.clear()\n"
        "            self.waiting.extend(found)\n"
        "        return super().schedule()", "are never answered"),
    (4, "CacheAware = 3", "Give the class"),
]  # fmt: skip


def test_who_says_no_with_none_is_right():
    answer = "def holds(block, parent, tokens):\n    if (block.parent, block.tokens) == (parent, tokens):\n"
    assert verdict(CHAPTER, 2, answer + "        return True").right


@pytest.mark.parametrize(("number", "answer", "words"), WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(number, answer, words):
    check_told(CHAPTER, number, answer, words)
