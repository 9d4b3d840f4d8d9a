"""The trace tells what happened, and what it tells is enough to rebuild every state of the blocks."""

import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path
from time import perf_counter, process_time, sleep

import pytest

import nanovllm.engine
from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.recorder import Recorder
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.trace import VERSION, BlockState, Trace

from .conftest import collector_off
from .scheduling import make_sequence

# -- Without a model ---------------------------------------------------------------------------------------------------


class Run:
    """A scheduler without a model, recorded: each step, the state that the block manager really has is kept."""

    def __init__(self, num_blocks: int, block_size: int = 4, budget: int = 100, max_num_seqs: int = 8) -> None:
        config = Config(
            num_kv_blocks=num_blocks, block_size=block_size, max_num_batched_tokens=budget, max_num_seqs=max_num_seqs
        )
        self.blocks = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(config, self.blocks)
        self.blocks.events = []
        self.recorder = Recorder(config, {}, self.blocks, self.scheduler, str, lambda recorder: None)
        self.trace = self.recorder.trace
        self.truth: list[tuple[BlockState, ...]] = []

    def add(self, seq: Sequence) -> None:
        self.scheduler.add(seq)
        self.recorder.add(seq, None)

    def step(self, token: int = 0, fails: bool = False) -> None:
        batch = self.scheduler.schedule()
        if fails:
            self.scheduler.fail(batch)
            self.note(batch=batch, error=RuntimeError("a kernel failed"))
        else:
            finished = self.scheduler.update(batch, [token] * sum(s.samples for s in batch.scheduled))
            self.note(batch=batch, finished=finished, times={"schedule": 0.001, "forward": 0.01})

    def abort(self, seq: Sequence) -> None:
        self.scheduler.finish(seq, "abort")
        self.note(finished=[seq])

    def note(self, **what) -> None:
        events, self.blocks.events = self.blocks.events, []
        self.recorder.record(events, **what)
        self.truth.append(state_of(self.blocks, self.scheduler.running))


def state_of(blocks: BlockManager, running: list[Sequence]) -> tuple[BlockState, ...]:
    """The state of every block as the block manager and the block tables have it."""
    owners: list[list[int]] = [[] for _ in blocks.blocks]
    filled = [0 if block.hash is None else blocks.block_size for block in blocks.blocks]
    for seq in running:
        for i, block in enumerate(seq.block_table):
            owners[block].append(seq.id)
            filled[block] = max(filled[block], min(seq.num_computed_tokens - i * blocks.block_size, blocks.block_size))
    places = {block: place for place, block in enumerate(blocks.free)}
    return tuple(
        BlockState(tuple(owners[i]), filled[i], block.ref_count, block.hash, places.get(i))
        for i, block in enumerate(blocks.blocks)
    )


def in_order_of_id(states: tuple[BlockState, ...]) -> list[BlockState]:
    """Owners in a fixed order: a trace names them in the order in which they came, the block manager in none."""
    return [state._replace(owners=tuple(sorted(state.owners))) for state in states]


def test_a_hand_worked_scene():
    run = Run(num_blocks=4)
    a, b = make_sequence("aaaa b", max_tokens=2, id=0), make_sequence("aaaa c", max_tokens=1, id=1)
    run.add(a), run.add(b)
    run.step(token=7)
    run.step(token=7)
    run.trace.close()
    first, second = run.trace.steps
    key = run.blocks.blocks[0].hash
    assert [(s.id, s.num_computed_tokens, s.num_new_tokens) for s in first.scheduled] == [(0, 0, 5), (1, 4, 1)]
    assert first.block_events == [
        ("allocate", 0, 0, None),
        ("allocate", 1, 0, None),
        ("fill", 0, 0, 4),
        ("fill", 1, 0, 1),
        ("cache", 0, 0, key),
        ("share", 0, 1, None),
        ("allocate", 2, 1, None),
        ("fill", 2, 1, 1),
        ("free", 2, 1, None),
        ("free", 0, 1, None),
    ]
    assert (first.sampled, first.finished, second.sampled, second.finished) == ({0: 7, 1: 7}, [1], {0: 7}, [0])
    assert run.trace.blocks_at(0) == (
        BlockState((0,), 4, 1, key, None),
        BlockState((0,), 1, 1, None, None),
        BlockState((), 0, 0, None, 0),  # given back last, taken first: it holds nothing
        BlockState((), 0, 0, None, 1),
    )
    assert run.trace.block_tables_at(0) == {0: (0, 1)}
    assert run.trace.blocks_at(-1) == (
        BlockState((), 4, 0, key, 3),  # still found by who begins alike, so it is the last to be taken
        BlockState((), 0, 0, None, 0),
        BlockState((), 0, 0, None, 1),
        BlockState((), 0, 0, None, 2),
    )
    assert run.trace.requests[0].output_token_ids == [7, 7] and run.trace.requests[1].finish_reason == "length"


def random_run(seed: int) -> tuple[Run, Counter[str]]:
    """A random workload on a tiny pool; with what happened in it."""
    rng = random.Random(seed)
    run = Run(rng.randint(5, 10), rng.choice([1, 2, 4]), rng.choice([3, 5, 8, 100]), rng.choice([2, 4, 8]))
    events = Counter[str]()
    longest = run.blocks.num_blocks * run.blocks.block_size
    prefixes = [[rng.randrange(3) for _ in range(longest)] for _ in range(2)]
    for id in range(rng.randint(4, 9)):
        num_prompt_tokens = rng.randint(1, longest - 4)
        prompt = rng.choice(prefixes)[: rng.randint(0, num_prompt_tokens)]
        prompt = (prompt + [rng.randrange(3) for _ in range(longest)])[:num_prompt_tokens]
        run.add(make_sequence(prompt, rng.randint(1, min(12, longest + 1 - num_prompt_tokens)), id))
        for _ in range(rng.randrange(4)):
            operate(run, rng, events)
    while run.scheduler.has_work():
        operate(run, rng, events)
    run.trace.close()
    for step in run.trace.steps:
        events["preemption"] += len(step.preempted)
        events["chunked prefill"] += len({s.id for s in step.scheduled} - step.sampled.keys()) if not step.error else 0
        for event in step.block_events:
            events[event.kind] += 1
    return run, events


def operate(run: Run, rng: random.Random, events: Counter[str]) -> None:
    seqs = [*run.scheduler.running, *run.scheduler.waiting]
    kind = rng.random()
    if kind < 0.06 and seqs:
        run.abort(rng.choice(seqs))
        events["abort"] += 1
    elif kind < 0.08:
        run.step(fails=True)
        events["failed step"] += 1
    elif kind < 0.2 and not seqs:
        run.blocks.clear()
        run.note()
    else:
        run.step(token=rng.randrange(3))


def test_replay_gives_what_the_block_manager_had_in_2000_random_workloads():
    happened = Counter[str]()
    for seed in range(2000):
        run, events = random_run(seed)
        happened += events
        rng = random.Random(seed)
        order = rng.sample(range(len(run.truth)), len(run.truth))  # backwards as well as forwards
        for i in order:
            assert in_order_of_id(run.trace.blocks_at(i)) == in_order_of_id(run.truth[i]), f"seed {seed}, step {i}"
    kinds = ("preemption", "share", "evict", "abort", "chunked prefill", "failed step")
    assert min(happened[kind] for kind in kinds) >= 1000, happened


def test_a_trace_that_begins_in_the_middle():
    run = Run(num_blocks=6)
    run.add(make_sequence("aaaa bbbb c", max_tokens=9, id=0))
    run.add(make_sequence("aaaa d", max_tokens=1, id=1))
    run.step(), run.step()
    late = Recorder(Config(num_kv_blocks=6, block_size=4), {}, run.blocks, run.scheduler, str, lambda recorder: None)
    assert late.trace.blocks_before() == run.truth[-1] == run.trace.blocks_at(1)
    run.blocks.events = []
    run.recorder = late
    late.add(run.scheduler.running[0], None)
    while run.scheduler.has_work():
        run.step(token=1)
    run.truth = run.truth[2:]
    assert [late.trace.blocks_at(i) for i in range(len(run.truth))] == run.truth
    assert late.trace.requests[0].output_token_ids == [0, 0, 1, 1, 1, 1, 1, 1, 1], "what came before is told as well"


def test_there_is_no_step_beyond_the_last():
    run = Run(num_blocks=4)
    with pytest.raises(IndexError, match="there is no step 0: the trace has 0 steps"):
        run.trace.blocks_at(0)
    run.add(make_sequence("aaaa"))
    run.step()
    with pytest.raises(IndexError, match="there is no step -2: the trace has 1 steps"):
        run.trace.blocks_at(-2)


# -- Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run.json", "run.json.gz"])
def test_round_trip(tmp_path, name):
    trace = random_run(5)[0].trace
    trace.save(tmp_path / name)
    loaded = Trace.load(tmp_path / name)
    assert loaded.to_dict() == trace.to_dict() and loaded.steps == trace.steps and loaded.requests == trace.requests
    assert [loaded.blocks_at(i) for i in range(len(trace.steps))] == [
        trace.blocks_at(i) for i in range(len(trace.steps))
    ]


def test_files_that_are_no_trace(tmp_path):
    trace = random_run(5)[0].trace
    path = tmp_path / "run.json.gz"
    trace.save(path)
    whole = path.read_bytes()
    for num_bytes in (0, 1, 5, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(ValueError, match=r"run.json.gz is not a trace, or is cut off"):
            Trace.load(path)
    path.write_text('{"cells": [], "metadata": {}}')
    with pytest.raises(ValueError, match="run.json.gz is not a trace of nanovllm: it does not say"):
        Trace.load(path)
    data = trace.to_dict()
    path.write_text(json.dumps(data | {"version": VERSION + 1}))
    with pytest.raises(ValueError, match=f"has version {VERSION + 1} of the trace format, .* update nanovllm"):
        Trace.load(path)
    for name in ("steps", "requests", "pool"):
        path.write_text(json.dumps({key: value for key, value in data.items() if key != name}))
        with pytest.raises(ValueError, match=f"run.json.gz is a damaged trace: KeyError '{name}'"):
            Trace.load(path)
    for name, column in (("scheduled", "num_new_tokens"), ("block_events", "block")):
        damaged = json.loads(json.dumps(data))
        del damaged["steps"][0][name][column]
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=f"run.json.gz is a damaged trace: KeyError '{column}'"):
            Trace.load(path)
    no_version = {key: value for key, value in data.items() if key != "version"}
    for damaged in (no_version, data | {"version": "1"}, data | {"steps": {"a": 1}}, data | {"token_texts": [1]}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="run.json.gz is a damaged trace"):
            Trace.load(path)
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "nothing.json")


def long_trace() -> Trace:
    """2,000 steps of 256 sequences."""
    run = Run(num_blocks=4096, block_size=16, budget=2048, max_num_seqs=256)
    rng = random.Random(0)
    num_added = 0
    for _ in range(2000):
        while len(run.scheduler.running) + len(run.scheduler.waiting) < 256:
            prompt = [rng.randrange(49152) for _ in range(rng.randint(20, 120))]
            run.add(make_sequence(prompt, rng.randint(20, 240), num_added))
            num_added += 1
        batch = run.scheduler.schedule()
        token_ids = [rng.randrange(49152) for s in batch.scheduled if s.samples]
        finished = run.scheduler.update(batch, token_ids)
        events, run.blocks.events = run.blocks.events, []
        times = {name: rng.random() for name in ("schedule", "prepare", "forward", "sample", "wait", "update")}
        run.recorder.record(events, batch, finished, times)
    run.trace.close()
    return run.trace


def test_a_long_trace_is_small_and_quick(tmp_path):
    trace = long_trace()
    assert sum(len(step.scheduled) for step in trace.steps) > 2000 * 250
    path = tmp_path / "long.json.gz"
    start = process_time()  # not the clock on the wall: other tests run beside this one
    trace.save(path)
    seconds = process_time() - start
    print(f"saved in {seconds:.1f} s, {path.stat().st_size / 1e6:.1f} MB")
    assert seconds < 5 and path.stat().st_size < 10e6, f"{seconds:.1f} s, {path.stat().st_size / 1e6:.1f} MB"
    loaded = Trace.load(path)
    assert loaded.steps == trace.steps
    rng = random.Random(1)
    slowest = 0.0
    with collector_off():  # a look at all that this process holds by now is no part of a state
        for index in rng.sample(range(2000), 50):
            start = process_time()
            loaded.blocks_at(index)
            slowest = max(slowest, process_time() - start)
    print(f"slowest state {1000 * slowest:.0f} ms")
    assert slowest < 0.05, f"{1000 * slowest:.0f} ms"


# -- With a model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def llm(model_path):
    llm = LLM(model_path, num_kv_blocks=12, block_size=4, max_num_batched_tokens=8)
    yield llm
    llm.close()


PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def test_the_trace_of_an_engine(llm):
    truth = []
    step = llm.engine.step

    def watched_step():
        result = step()
        truth.append(state_of(llm.engine.block_manager, llm.engine.scheduler.running))
        return result

    llm.engine.step = watched_step
    with llm.trace() as trace:
        outputs = llm.generate(["The same beginning, A", "The same beginning, B", "x"], PARAMS, use_tqdm=False)
    llm.generate(["not recorded"], PARAMS, use_tqdm=False)
    assert [in_order_of_id(trace.blocks_at(i)) for i in range(len(trace.steps))] == [
        in_order_of_id(t) for t in truth[: len(trace.steps)]
    ]
    assert [r.output_token_ids for r in trace.requests.values()] == [output["token_ids"] for output in outputs]
    assert [r.prompt for r in trace.requests.values()] == ["The same beginning, A", "The same beginning, B", "x"]
    assert [r.finish_reason for r in trace.requests.values()] == ["length"] * 3
    assert list(trace.steps[0].times) == ["schedule", "prepare", "forward", "sample", "wait", "update"]
    assert all(step.num_tokens <= 8 for step in trace.steps)
    assert trace.environment["dtype"] == "float32" and "/" not in json.dumps(trace.config)
    assert repr(trace) == f"Trace: {len(trace.steps)} steps, 3 requests, 12 blocks of 4 tokens"


def test_a_step_is_as_long_as_it_took(llm, monkeypatch):
    """With the time in which Python waits for what a step gives, on a GPU most of it."""
    tokens = LaunchedStep.tokens
    monkeypatch.setattr(LaunchedStep, "tokens", lambda self: sleep(0.02) or tokens(self))
    with llm.trace() as trace:
        llm.add_request("Hello", PARAMS)
        start = perf_counter()
        while llm.has_unfinished_requests():
            llm.step()
        seconds = perf_counter() - start
    assert all(step.times["wait"] >= 0.02 for step in trace.steps)
    assert 0.8 * seconds < sum(sum(step.times.values()) for step in trace.steps) <= seconds


def test_what_happens_between_steps_is_told_at_once(llm):
    with llm.trace() as trace:
        a = llm.add_request("abcdefgh", PARAMS)
        b = llm.add_request("ijklmnop", PARAMS)
        llm.step(), llm.step(), llm.step()
        assert set(trace.block_tables_at(-1)) == {a, b}
        llm.abort(b)
        assert set(trace.block_tables_at(-1)) == {a} and trace.steps[-1].finished == [b]
        assert trace.requests[b].finish_reason == "abort" and not trace.steps[-1].scheduled
        while llm.has_unfinished_requests():
            llm.step()
        assert any(block.hash for block in trace.blocks_at(-1))
        llm.reset_prefix_cache()
        assert [(block.hash, block.free_index) for block in trace.blocks_at(-1)] == [(None, i) for i in range(12)]


def test_the_prefix_cache_is_not_reset_under_a_request(llm):
    llm.add_request("abcd", PARAMS)
    with pytest.raises(RuntimeError, match="1 requests are unfinished; finish or abort them first"):
        llm.reset_prefix_cache()


def test_a_failed_step_is_told(llm, monkeypatch):
    with llm.trace() as trace:
        llm.add_request("abcdefgh", PARAMS)
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.model_runner, "launch", lambda batch: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                llm.step()
        assert trace.steps[0].error == "division by zero" and trace.steps[0].sampled == {}
        assert trace.block_tables_at(0) == {}
        while llm.has_unfinished_requests():
            llm.step()
    assert len(trace.requests[0].output_token_ids) == 6


def test_several_traces_at_once(llm):
    with llm.trace() as outer:
        llm.generate(["abc"], PARAMS, use_tqdm=False)
        with llm.trace() as inner:
            llm.generate(["abcdef"], PARAMS, use_tqdm=False)
        llm.generate(["abcdefghi"], PARAMS, use_tqdm=False)
    assert list(inner.requests) == [1] and list(outer.requests) == [0, 1, 2]
    middle = len(outer.steps) // 3
    assert inner.blocks_at(-1) in [outer.blocks_at(i) for i in range(middle, len(outer.steps))]
    assert llm.engine.block_manager.events is None and not llm.engine.recorders
    outer.close()  # twice is fine


def test_nothing_is_recorded_when_no_trace_is_open(llm):
    """Nothing is allocated by the code of the trace, and blocks tell nobody."""
    with llm.trace():
        llm.generate(["warm"], PARAMS, use_tqdm=False)
    folder = Path(nanovllm.engine.__file__).parent
    tracemalloc.start()
    try:
        llm.generate(["abcdefgh", "ijkl"], PARAMS, use_tqdm=False)
        snapshot = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    files = [tracemalloc.Filter(True, str(folder / name)) for name in ("trace.py", "recorder.py")]
    assert not snapshot.filter_traces(files).statistics("lineno")
    assert llm.engine.block_manager.events is None


# -- The Chrome trace format -------------------------------------------------------------------------------------------


def test_chrome_trace(llm, tmp_path):
    with llm.trace() as trace:
        llm.generate(["abcdefghijkl", "xyz"], PARAMS, use_tqdm=False)
    trace.to_chrome(tmp_path / "run.json")
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    for event in events:
        assert isinstance(event["name"], str) and isinstance(event["pid"], int)
        assert event["ph"] == "M" or event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0 and isinstance(event["tid"], int)
    slices = [event for event in events if event["ph"] == "X"]
    steps = [event for event in slices if event["name"].startswith("step ")]
    assert len(steps) == len(trace.steps)
    for i, outer in enumerate(steps):
        phases = [s for s in slices if s is not outer and outer["ts"] <= s["ts"] < outer["ts"] + outer["dur"]]
        assert [phase["name"] for phase in phases] == ["schedule", "prepare", "forward", "sample", "wait", "update"]
        assert all(p["ts"] + p["dur"] <= outer["ts"] + outer["dur"] + 1e-3 for p in phases), "phases nest in their step"
        assert i == 0 or steps[i - 1]["ts"] + steps[i - 1]["dur"] <= outer["ts"] + 1e-3, "steps do not overlap"
    counters = {event["name"] for event in events if event["ph"] == "C"}
    assert counters == {"blocks in use", "running", "waiting", "tokens"}
    in_use = [event["args"]["blocks in use"] for event in events if event["name"] == "blocks in use"]
    assert in_use == [sum(b.ref_count > 0 for b in trace.blocks_at(i)) for i in range(len(trace.steps))]
