"""Frames tell what happened in words and pictures; here without a browser, on scenes that can be checked by hand."""

import random
import re
from collections import Counter
from time import perf_counter

import pytest

from nanovllm.config import Config
from nanovllm.engine.recorder import Recorder
from nanovllm.engine.trace import BlockEvent, BlockState, Pool, Scheduled, Step, Trace, TracedRequest
from nanovllm.viz.figures import cache_map_alt, cache_map_figure, timeline_alt, timeline_figure
from nanovllm.viz.frames import Frames
from nanovllm.viz.sentences import listed, numbered
from nanovllm.viz.text import cache_map_text, timeline_text
from nanovllm.viz.theme import png

from .scheduling import make_sequence
from .test_trace import Run, random_run


def told(run: Run) -> list[str]:
    """What the frames say, from the first step on."""
    frames = Frames(run.trace)
    return [f"{frames[i].title}: {frames[i].sentence}" for i in range(1, len(frames))]


def statuses(run: Run) -> list[str]:
    """The statuses after each step; a letter is too little to read, so the words."""
    frames = Frames(run.trace)
    return [" ".join(request.status for request in frames[i].requests) for i in range(len(frames))]


# -- Scenes ------------------------------------------------------------------------------------------------------------


def sharing() -> Run:
    """B begins as A does; a step later both are done."""
    run = Run(num_blocks=4)
    run.add(make_sequence("aaaa b", max_tokens=2, id=0))
    run.add(make_sequence("aaaa c", max_tokens=1, id=1))
    run.step(token=7), run.step(token=7)
    return run


def preemption() -> Run:
    """Two requests of two blocks each fill the pool; in step 4, A needs a third."""
    run = Run(num_blocks=4)
    for i, prompt in enumerate(("aaaa b", "cccc d")):
        run.add(make_sequence(prompt, max_tokens=6, id=i))
    while run.scheduler.has_work():
        run.step(token=7)
    return run


def test_a_shared_block():
    run = sharing()
    assert told(run) == [
        "step 0: A joins and computes 5 tokens. B joins, finds 4 tokens in the prefix cache and computes 1 token. "
        "B is finished, block 2 returns.",  # block 0 stays: A holds it, too
        "step 1: A generates one token. A is finished, blocks 0 and 1 return.",
    ]
    assert statuses(run) == ["waiting waiting", "prefill finished", "finished finished"]
    frames = Frames(run.trace)
    assert (frames[0].title, frames[0].sentence) == ("before the first step", "A and B arrive.")
    a, b = frames[1].requests
    assert (a.num_tokens, a.num_computed_tokens, a.num_new_tokens, a.num_hit_tokens, a.block_table) == (
        6,
        5,
        5,
        0,
        (0, 1),
    )
    assert (b.num_tokens, b.num_computed_tokens, b.num_new_tokens, b.num_hit_tokens, b.block_table) == (6, 5, 1, 4, ())
    assert frames[1].changed == {0, 1, 2} and frames[2].changed == {0, 1}
    assert frames[1].summary == "1 running, 0 waiting, 2 of 4 blocks in use, 0 kept for the prefix cache"
    assert (frames[2].num_used_blocks, frames[2].num_kept_blocks, frames[2].num_tokens) == (0, 1, 1)


def test_a_preemption():
    run = preemption()
    assert told(run) == [
        "step 0: A joins and computes 5 tokens. B joins and computes 5 tokens.",
        "step 1: A and B generate one token each.",
        "step 2: A and B generate one token each.",
        "step 3: A and B generate one token each.",
        "step 4: A needs a block, none is free: B is preempted, blocks 2 and 3 return. A generates one token. "
        "Block 3 leaves the prefix cache.",
        "step 5: A generates one token. A is finished, blocks 0, 1 and 3 return.",
        "step 6: B joins again, finds 4 tokens in the prefix cache and computes 5 tokens. "
        "Block 1 leaves the prefix cache.",
        "step 7: B generates one token. B is finished, blocks 1-3 return.",
    ]
    assert statuses(run)[4:] == [
        "decode decode",
        "decode preempted",
        "finished preempted",
        "finished prefill",  # what it had is computed again
        "finished finished",
    ]
    assert Frames(run.trace)[5].requests[1].num_computed_tokens == 0


def test_who_needs_a_block_may_be_the_one_preempted():
    run = Run(num_blocks=4)
    run.add(make_sequence("aaaa b", max_tokens=8, id=0))
    run.add(make_sequence("aaaa c", max_tokens=5, id=1))
    for _ in range(5):
        run.step(token=7)
    assert told(run)[4] == (  # A takes the last block, so B has none; block 0 stays with A
        "step 4: B needs a block, none is free; it came last, so it is preempted, block 2 returns. "
        "A generates one token."
    )


def test_one_preemption_may_not_be_enough():
    """A needs two blocks, and those who came later have one each."""
    trace = Trace({"num_kv_blocks": 4, "block_size": 4, "max_num_batched_tokens": 9}, {}, Pool(4), str)
    trace.requests = {i: TracedRequest(i, 0, None, [7] * num_tokens, [7]) for i, num_tokens in enumerate((12, 4, 4))}
    joining = [BlockEvent("allocate", i, i) for i in range(3)]
    taking = [BlockEvent("free", 2, 2), BlockEvent("free", 1, 1), *(BlockEvent("allocate", i, 0) for i in (1, 2))]
    trace.steps = [
        Step(0, 0.0, [Scheduled(i, 4 - (i == 0), 0) for i in range(3)], [], [], [], joining, {1: 7, 2: 7}, {}),
        Step(1, 0.1, [Scheduled(0, 9, 3)], [], [2, 1], [], taking, {0: 7}, {}),
    ]
    assert Frames(trace)[2].sentence == (
        "A needs more blocks than are free: C is preempted, block 2 returns. "
        "That is not enough: B is preempted, block 1 returns. A computes 9 more tokens."
    )


def test_chunks_a_failed_step_an_abort_and_what_comes_between_steps():
    run = Run(num_blocks=6, budget=3)
    a = make_sequence("aaaa bb", max_tokens=3, id=0)
    run.add(a)
    run.step()
    run.step(fails=True)
    run.step(), run.step(), run.step()
    run.abort(a)
    run.blocks.clear()
    run.note()
    run.add(make_sequence("d", max_tokens=3, id=9))
    assert told(run) == [
        "step 0: A joins and computes 3 tokens, 3 to go.",
        "step 1: The step fails (a kernel failed): A gives its blocks back.",
        "step 2: A joins again and computes 3 tokens, 3 to go.",
        "step 3: A computes 3 more tokens.",
        "step 4: A generates one token.",
        "after step 4: A is aborted, blocks 0 and 1 return.",
        "after step 4: The prefix cache is emptied: all blocks are as new. B arrives.",
    ]
    assert statuses(run) == [
        "waiting",
        "prefill",
        "preempted",
        "prefill",
        "prefill",
        "decode",
        "aborted",
        "aborted waiting",
    ]
    frames = Frames(run.trace)
    assert [request.did for request in frames[2].requests] == ["failed"] and frames[2].num_tokens == 0
    assert frames[7].changed == frozenset()


def test_an_abort_before_the_first_step():
    run = Run(num_blocks=4)
    a = make_sequence("aaaa", id=0)
    run.add(a)
    run.abort(a)
    assert told(run) == ["before the first step: A is aborted."]


def test_a_trace_that_grows_is_the_trace_that_is_read_afterwards():
    """A picture looks after every step; each request is seen as soon as it has come, though no step has seen it."""
    run = Run(num_blocks=8, budget=4)
    live = Frames(run.trace)
    assert live[0].sentence == "Nothing has happened yet." and live[0].requests == ()
    for i in range(3):
        run.add(make_sequence("aaaa b", max_tokens=3, id=i))
        assert [request.name for request in live[-1].requests] == ["A", "B", "C"][: i + 1]
        assert live[-1].sentence.endswith(f"{'ABC'[i]} arrives.") and live[-1].requests[-1].status == "waiting"
        run.step()
        live[-1]
    afterwards = Frames(run.trace)
    assert [live[i] for i in range(len(live))] == [afterwards[i] for i in range(len(afterwards))]
    assert live.digest() == afterwards.digest()


def test_a_trace_that_begins_in_the_middle():
    run = Run(num_blocks=12, budget=8)
    for i, prompt in enumerate(("aaaa b", "cccc cccc cccc", "d")):
        run.add(make_sequence(prompt, max_tokens=9, id=i))
    run.step(), run.step()  # A is through its prompt, B is not, and C has not begun
    run.recorder = Recorder(Config(num_kv_blocks=12, block_size=4), {}, run.blocks, run.scheduler, None, lambda _: None)
    run.trace = run.recorder.trace
    for seq in (*run.scheduler.running, *run.scheduler.waiting):
        run.recorder.add(seq, None)
    run.step(), run.step()
    assert Frames(run.trace)[0].sentence == "A and B run already. C arrives."
    assert told(run) == [
        "step 0: B computes 2 more tokens. C joins and computes 1 token. A generates one token.",
        "step 1: A, B and C generate one token each.",
    ]
    assert statuses(run) == ["decode prefill waiting", "decode prefill prefill", "decode decode decode"]
    assert [request.num_tokens for request in Frames(run.trace)[-1].requests] == [9, 14, 3]


def test_words_for_many():
    assert listed(["A"]) == "A" and listed(["A", "B", "C"]) == "A, B and C"
    assert listed(list("ABCDEFGH")) == "A, B, C and 5 more"
    assert numbered([3]) == "block 3" and numbered((6, 5, 0, 1, 2)) == "blocks 0-2, 5 and 6"
    run = Run(num_blocks=40, max_num_seqs=20)
    for i in range(10):
        run.add(make_sequence([i] * 5, max_tokens=2, id=i))
    run.step(), run.step()
    first, second = told(run)
    assert first.endswith("F joins and computes 5 tokens. 4 more compute 20 tokens.")
    assert second.startswith(
        "step 1: A, B, C and 7 more generate one token each. A is finished, blocks 0 and 1 return."
    )
    assert second.endswith("F is finished, blocks 10 and 11 return. 4 more are over.")


# -- Whatever happens --------------------------------------------------------------------------------------------------


def test_frames_of_random_runs():
    """What a frame says of requests is what the blocks say, sentences are well formed, and names stay."""
    happened = Counter[str]()
    for seed in range(300):
        run = random_run(seed)[0]
        frames = Frames(run.trace)
        names = {request.id: request.name for request in frames[-1].requests}
        assert list(names) == list(run.trace.requests) and len(set(names.values())) == len(names)
        for i in range(len(frames)):
            frame, block_size = frames[i], run.trace.block_size
            requests = {request.id: request for request in frame.requests}
            assert all(names[request.id] == request.name for request in frame.requests)
            tables = run.trace.block_tables_at(i - 1) if i else run.trace.block_tables_before()
            assert {r.id: r.block_table for r in frame.requests if r.block_table} == tables
            for block, state in enumerate(frame.blocks):
                assert sorted(state.owners) == [r.id for r in frame.requests if block in r.block_table]
            assert frame.num_used_blocks == sum(state.ref_count > 0 for state in frame.blocks)
            for r in frame.requests:
                assert r.is_running == bool(r.block_table), f"seed {seed}, frame {i}: {r}"
                assert not r.is_waiting or r.num_computed_tokens == 0
                assert not r.is_running or len(r.block_table) == -(-r.num_computed_tokens // block_size)
                assert (r.did in ("prefill", "decode")) == (r.num_new_tokens > 0)
                assert r.did != "decode" or r.num_new_tokens == 1
                happened[r.did] += 1
            if i:
                step = run.trace.steps[i - 1]
                assert sum(r.num_new_tokens for r in frame.requests) == frame.num_tokens
                assert {r.id for r in frame.requests if r.did == "preempted"} == set(step.preempted)
                before = {r.id: r for r in frames[i - 1].requests}
                changed = [b for b, states in enumerate(zip(frames[i - 1].blocks, frame.blocks)) if differ(*states)]
                assert set(changed) <= frame.changed or "emptied" in frame.sentence
                assert before.keys() <= requests.keys()
            check_english(frame.sentence)
        assert [r.num_tokens for r in frames[-1].requests] == [
            len(r.prompt_token_ids) + len(r.output_token_ids) for r in run.trace.requests.values()
        ]
    assert min(happened[did] for did in ("prefill", "decode", "wait", "preempted", "failed")) > 50, happened


def differ(before: BlockState, after: BlockState) -> bool:
    return before[:4] != after[:4]  # its place in the queue moves whenever another is taken


def check_english(sentence: str) -> None:
    parts = sentence.removesuffix(".").split(". ")
    assert sentence.endswith(".") and all(part[0].isupper() for part in parts), sentence
    assert not re.search(r"\b1 (more )?tokens|\b([02-9]|\d\d+) (more )?token\b", sentence), sentence
    assert not re.search(r"block \d+(, | and |-)\d|blocks \d+(?! and |,|-)", sentence), sentence
    assert not re.search(r" and [A-Z]\d* (joins|is|generates)\b|  |,,", sentence), sentence


def test_the_digest_changes_when_a_block_event_does():
    trace = preemption().trace
    digest = Frames(trace).digest()
    assert re.fullmatch("[0-9a-f]{12}", digest) and Frames(Trace.from_dict(trace.to_dict())).digest() == digest
    num_changed = 0
    for i, step in enumerate(trace.steps):
        for k, event in enumerate(step.block_events):
            altered = Trace.from_dict(trace.to_dict())
            altered.steps[i].event_rows[k] = event._replace(block=(event.block + 1) % 4)
            assert Frames(altered).digest() != digest, f"step {i}, {event}"
            num_changed += 1
    assert num_changed > 30
    slower = Trace.from_dict(trace.to_dict())
    slower.steps[0].times = {"schedule": 1.0}
    slower.steps[0].start = 9.0
    assert Frames(slower).digest() == digest


def test_there_is_no_frame_beyond_the_last():
    frames = Frames(sharing().trace)
    assert len(frames) == 3 and frames[-1] == frames[2] and frames.index_of(None) == 1
    with pytest.raises(IndexError, match="there is no frame 3: the trace has 2 steps"):
        frames[3]


def busy_trace(num_blocks: int, num_seqs: int, num_steps: int) -> Trace:
    """Requests of 20 to 360 tokens, always as many as may run."""
    run = Run(num_blocks, block_size=16, budget=512, max_num_seqs=num_seqs)
    rng = random.Random(0)
    for i in range(num_steps):
        while len(run.scheduler.running) + len(run.scheduler.waiting) < num_seqs:
            prompt = [rng.randrange(49152) for _ in range(rng.randint(20, 120))]
            run.add(make_sequence(prompt, rng.randint(20, 240), id=len(run.trace.requests)))
        batch = run.scheduler.schedule()
        finished = run.scheduler.update(batch, [7] * sum(s.samples for s in batch.scheduled))
        events, run.blocks.events = run.blocks.events, []
        run.recorder.record(events, batch, finished)
    run.trace.close()
    return run.trace


def test_a_long_trace_has_quick_frames():
    trace = busy_trace(num_blocks=512, num_seqs=64, num_steps=500)
    frames = Frames(trace)
    start = perf_counter()
    assert len([frames[i] for i in range(len(frames))]) == 501
    frames.digest()
    seconds = perf_counter() - start
    assert seconds < 2, f"{seconds:.1f} s"


# -- As characters -----------------------------------------------------------------------------------------------------


def test_a_cache_map_in_characters():
    assert cache_map_text(Frames(preemption().trace), 5) == """\
step 4: A needs a block, none is free: B is preempted, blocks 2 and 3 return. A generates one token. \
Block 3 leaves the prefix cache.
1 running, 1 waiting, 3 of 4 blocks in use, 1 kept for the prefix cache
request  status     tokens  computed  block table
A        decode         10         9  0 1 3
B        preempted       9         0
block   0  |####|  A
block   1  |####|  A
block   2  |~~~~|  kept, #1 in the queue  *
block   3  |#   |  A  *

step 0: A joins and computes 5 tokens. B joins and computes 5 tokens.
step 1: A and B generate one token each.
step 2: A and B generate one token each.
step 3: A and B generate one token each.
step 4: A needs a block, none is free: B is preempted, blocks 2 and 3 return. A generates one token. \
Block 3 leaves the prefix cache.
step 5: A generates one token. A is finished, blocks 0, 1 and 3 return.
step 6: B joins again, finds 4 tokens in the prefix cache and computes 5 tokens. Block 1 leaves the prefix cache.
step 7: B generates one token. B is finished, blocks 1-3 return.
digest DIGEST""".replace("DIGEST", Frames(preemption().trace).digest())


def test_a_timeline_in_characters():
    text = timeline_text(Frames(preemption().trace), 5)
    assert text.splitlines()[:5] == [
        "step    0  1  2  3  4  5  6  7",
        "A       P5 D  D  D  D  DF",
        "B       P5 D  D  D  X  .  H5 DF",
        "tokens  10 2  2  2  1  1  5  1",
        "                    ^",
    ]
    assert "The budget is 100 tokens a step." in text


def test_aborted_and_failed_in_a_timeline():
    run = Run(num_blocks=6, budget=3)
    a = make_sequence("aaaa bb", max_tokens=3, id=0)
    run.add(a), run.step(), run.step(fails=True), run.step(), run.abort(a)
    assert timeline_text(Frames(run.trace), 0).splitlines()[1:3] == ["A       P3 !  P3 A", "tokens  3  0  3  0"]


@pytest.mark.parametrize("num_blocks, num_seqs", [(24, 3), (64, 12), (512, 64), (4096, 250)])
def test_a_text_stays_short(num_blocks, num_seqs):
    frames = Frames(busy_trace(num_blocks, num_seqs, num_steps=60))
    for text in (cache_map_text(frames, 40), timeline_text(frames, 40)):
        lines = text.splitlines()
        assert len(lines) <= 60 and max(map(len, lines)) < 420
    assert "... and 36 more steps" in cache_map_text(frames, 40)


# -- As figures --------------------------------------------------------------------------------------------------------


def words(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_cache_map_as_a_figure():
    figure = cache_map_figure(Frames(preemption().trace), 5)
    pool, requests = figure.axes
    assert words(pool) == ["A", "0", "A", "1", "kept\n#1", "2", "A", "3"]
    assert "decode\n10 tokens" in words(requests) and "preempted\n9 tokens" in words(requests)
    assert [word for word in words(requests) if word.startswith("in ")] == ["in 0", "in 1", "in 3"]
    bold = [patch.get_x() for patch in pool.patches if patch.get_linewidth() > 2]
    assert len(bold) == 2, "blocks 2 and 3 changed"
    assert "step 4: A needs a block" in figure.get_suptitle()
    assert cache_map_alt(Frames(preemption().trace), 5) == (
        "The blocks of the KV cache, step 4: 1 running, 1 waiting, 3 of 4 blocks in use, 1 kept for the prefix cache. "
        "A holds blocks 0, 1 and 3."
    )


def test_a_shared_block_has_a_band_for_each_owner():
    run = Run(num_blocks=4)
    for i, last in enumerate("bc"):
        run.add(make_sequence("aaaa" + last, id=i))
    run.step()
    pool, _ = cache_map_figure(Frames(run.trace), 1).axes
    assert words(pool)[:3] == ["A", "B", "0"]


def test_a_timeline_as_a_figure():
    rows, tokens = timeline_figure(Frames(preemption().trace), 5).axes
    assert [label.get_text() for label in rows.get_yticklabels()] == ["A", "B"]
    assert words(rows) == ["5", "5", "H5"]
    legend = [text.get_text() for text in rows.get_legend().get_texts()]
    assert legend == ["prefill of so many tokens, H after a hit", "decode", "waits", "preempted", "finished"]
    assert tokens.get_xlabel() == "step" and tokens.get_ylabel() == "tokens"
    assert timeline_alt(Frames(preemption().trace), 5).startswith(
        "2 requests over 8 steps, with 1 preemption; a step has up to 10 of 100 tokens. Step 4: A needs a block"
    )


@pytest.mark.parametrize("num_blocks, num_seqs", [(24, 3), (64, 12), (512, 64), (4096, 250)])
def test_figures_of_any_size_are_as_wide_as_a_page(num_blocks, num_seqs):
    frames = Frames(busy_trace(num_blocks, num_seqs, num_steps=60))
    for figure in (cache_map_figure(frames, 40), timeline_figure(frames, 40), cache_map_figure(frames, 0)):
        assert figure.get_figwidth() == 9 and figure.get_figheight() < 20
        assert png(figure).startswith(b"\x89PNG")


def test_nothing_has_happened_yet():
    frames = Frames(Run(num_blocks=4).trace)
    assert cache_map_text(frames, 0).startswith(
        "before the first step: Nothing has happened yet.\n0 running, 0 waiting"
    )
    assert timeline_text(frames, 0) and png(timeline_figure(frames, 0)) and png(cache_map_figure(frames, 0))
