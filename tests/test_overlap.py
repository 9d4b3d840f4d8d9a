"""Overlapped steps give what steps one after the other give.

Only a GPU's engine overlaps. Here one on a CPU does: what its sequences sampled last is kept beside it, in the place of
the table on the GPU. With one (tests/gpu) the same happens for real.
"""

import random
import weakref
from dataclasses import replace

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.overlap import Overlap
from tests.conftest import Panic, abandoned_stream, alarms, collecting_once, collector_off, failing_once, interrupted
from tests.scheduling import Slips


def overlapping(path, **settings) -> LLM:
    """An engine on a CPU that overlaps its steps."""
    llm = LLM(path, dtype="float32", device="cpu", **settings)
    runner, last_tokens = llm.engine.model_runner, {}
    launch, prepare = runner.launch, runner.prepare

    def remembering_launch(batch):
        step = launch(batch)
        rows = [s.seq.row for s in batch.scheduled if s.samples]
        last_tokens.update(zip(rows, step.tokens(), strict=True))
        return step

    def knowing_prepare(tokens, slot_mapping):
        for i in (tokens.input_ids < 0).nonzero()[0]:
            tokens.input_ids[i] = last_tokens[tokens.rows[tokens.owner[i]]]
        return prepare(tokens, slot_mapping)

    runner.launch, runner.prepare = remembering_launch, knowing_prepare
    llm.engine.overlap = Overlap(llm.engine)
    return llm


@pytest.fixture(scope="module")
def plain(model_path) -> LLM:
    return LLM(model_path, dtype="float32", device="cpu", num_kv_blocks=400)


def workload(seed: int, num_requests: int = 12) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that begin alike or not, greedy and seeded requests, with and without an end token to stop at."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(256) for _ in range(rng.randint(1, 40))] for _ in range(3)]
    prompts = [
        rng.choice(beginnings) + [rng.randrange(256) for _ in range(rng.randint(1, 20))] for _ in range(num_requests)
    ]
    params = [
        SamplingParams(
            temperature=rng.choice([0, 0, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            seed=i,
            max_tokens=rng.randint(1, 30),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=[rng.randrange(256) for _ in range(8)],
            logprobs=rng.choice([None, None, 2]),
        )
        for i in range(num_requests)
    ]
    return prompts, params


def tidy(llm: LLM) -> None:
    """Nothing is left of the requests: no step in flight, every block and every row free."""
    engine = llm.engine
    assert not engine.overlap.in_flight and not engine.scheduler.running and not engine.scheduler.waiting
    assert len(engine.block_manager.free) == engine.block_manager.num_blocks
    assert len(engine.scheduler.free_rows) == engine.config.max_num_seqs


@pytest.mark.parametrize("seed", range(10))
def test_the_same_answers(plain, model_path, seed):
    """With a pool so small that sequences are preempted, and a budget so small that prompts come in chunks."""
    prompts, params = workload(seed)
    expected = plain.generate(prompts, params, use_tqdm=False)
    rng = random.Random(seed)
    llm = overlapping(
        model_path,
        num_kv_blocks=rng.randint(24, 40),
        block_size=4,
        max_num_batched_tokens=rng.choice([8, 40, 2048]),
        max_num_seqs=rng.choice([2, 6, 20]),
    )
    answers = llm.generate(prompts, params, use_tqdm=False)
    for name in ("token_ids", "text", "finish_reason"):
        assert [a[name] for a in answers] == [a[name] for a in expected]
    assert [a["logprobs"] and [set(step) for step in a["logprobs"]] for a in answers] == [
        a["logprobs"] and [set(step) for step in a["logprobs"]] for a in expected
    ]
    tidy(llm)


def test_two_steps_are_in_flight_at_a_time(model_path):
    llm = overlapping(model_path)
    events = []
    launch, update = llm.engine.model_runner.launch, llm.engine.scheduler.update
    llm.engine.model_runner.launch = lambda batch: events.append("launch") or launch(batch)
    llm.engine.scheduler.update = lambda *args: events.append("update") or update(*args)
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert events == ["launch", "launch", "update", "launch", "update", "launch", "update", "update"]


def test_an_answer_that_ends_early_is_cut_there(model_path, plain):
    """Its last token ends it; a step that was launched meanwhile computed one more, which nobody sees."""
    (long,) = plain.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    stop = long["token_ids"][5]
    llm = overlapping(model_path)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
    (answer,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    end = long["token_ids"].index(stop) + 1
    assert (answer["token_ids"], answer["finish_reason"]) == (long["token_ids"][:end], "stop")
    tidy(llm)


def test_steps_by_hand_and_traces_do_not_overlap(model_path):
    llm = overlapping(model_path)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    request_id = llm.add_request([1, 2, 3], params)
    assert llm.step() == llm.step() == [] and [a["request_id"] for a in llm.step()] == [request_id]
    with llm.trace() as trace:
        llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert len(trace.steps) == 3 and all(step.sampled for step in trace.steps)
    tidy(llm)


def test_who_was_added_by_hand_is_answered_by_the_next_step(model_path):
    """It finishes while `generate` runs, or in a step that this has left in flight."""
    llm = overlapping(model_path)
    ids = [llm.add_request([7], SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)) for n in (2, 5, 6, 30)]
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    answers = []
    while llm.has_unfinished_requests():
        answers += llm.step()
    assert sorted(a["request_id"] for a in answers) == ids
    assert [len(a["token_ids"]) for a in sorted(answers, key=lambda a: a["request_id"])] == [2, 5, 6, 30]
    tidy(llm)


def test_a_stream_left_early_and_an_abort_in_flight(model_path):
    llm = overlapping(model_path)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    stream = llm.stream([1, 2, 3], params)
    next(stream), next(stream)
    assert llm.engine.overlap.in_flight
    stream.close()
    llm.reset_prefix_cache()
    tidy(llm)
    stream = llm.stream([1, 2, 3], params)
    next(stream)
    with llm.trace() as trace:  # opened with a step in flight
        for _ in stream:
            pass
    assert sum(len(step.sampled) for step in trace.steps) in (18, 19)
    tidy(llm)


def test_a_scheduler_that_raises_while_a_step_is_in_flight(model_path, plain):
    """Nobody knows how far it had come: that step is dropped, too, and all who run are computed again."""
    prompts, params = [[1, 2, 3], list(range(40))], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = [a["token_ids"] for a in plain.generate(prompts, params, use_tqdm=False)]

    llm = overlapping(model_path, scheduler=Slips)
    ids = [llm.add_request(prompts[0], params)]
    stream = llm.stream(prompts[1], params)
    for _ in range(3):
        llm._step()
    assert llm.engine.overlap.in_flight
    with pytest.raises(IndexError, match="a slip"):
        next(stream)  # is admitted, and takes itself out again
    ids.append(llm.add_request(prompts[1], params))
    answers = {}
    while llm.has_unfinished_requests():
        answers |= {answer["request_id"]: answer["token_ids"] for answer in llm.step()}
    assert [answers[id] for id in ids] == expected
    tidy(llm)


@pytest.mark.parametrize("failing_launch", [1, 2, 3, 5])
@pytest.mark.parametrize("what", ["launch", "tokens"])
@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_step_that_fails(model_path, plain, failing_launch, what, error):
    """The call raises; who was added by hand is computed again and gets the same answer.

    SystemExit is what the handler of a signal may raise, wherever Python happens to be: waiting for a step, mostly.
    """
    prompts, params = [[1, 2, 3], list(range(40)), [9]], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = [a["token_ids"] for a in plain.generate(prompts, params, use_tqdm=False)]
    llm = overlapping(model_path, max_num_batched_tokens=32)
    runner, num_launches = llm.engine.model_runner, 0
    launch = runner.launch

    def failing(batch):
        nonlocal num_launches
        num_launches += 1
        if num_launches == failing_launch and what == "launch":
            raise error("the GPU is on fire")
        step = launch(batch)
        if num_launches == failing_launch:

            def tokens():
                raise error("the GPU is on fire")

            step.tokens = tokens
        return step

    runner.launch = failing
    by_hand = [llm.add_request(prompt, params) for prompt in prompts]
    with pytest.raises(error, match="on fire"):
        llm.generate([[4, 4, 4]], params, use_tqdm=False)
    answers = {}
    while llm.has_unfinished_requests():
        answers |= {a["request_id"]: a["token_ids"] for a in llm.step()}
    assert [answers[i] for i in by_hand] == expected
    tidy(llm)


@pytest.mark.parametrize("max_tokens", [1, 12])
def test_a_text_that_cannot_be_made(model_path, plain, monkeypatch, max_tokens):
    """The one request is aborted, although a step for it is in flight; all others get their answers."""
    prompts = [[1, 2, 3], [9, 8], list(range(40))]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = [a["token_ids"] for a in plain.generate(prompts, params, use_tqdm=False)]
    llm = overlapping(model_path)
    monkeypatch.setattr(Detokenizer, "append", failing_once(Detokenizer.append, Panic()))
    bad, *good = llm.generate(prompts, [replace(params, max_tokens=max_tokens), params, params], use_tqdm=False)
    assert bad["finish_reason"] == "abort" and bad["token_ids"] == expected[0][:1]
    assert [answer["token_ids"] for answer in good] == expected[1:]
    tidy(llm)


@pytest.mark.parametrize("name", ["schedule", "update", "finish"])
@pytest.mark.parametrize("call_number", [1, 2, 3, 5])
def test_the_handler_of_a_signal_that_raises_harms_nobody(model_path, plain, monkeypatch, name, call_number):
    prompts, params = [[1, 2, 3], list(range(40)), [9]], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = plain.generate(prompts, params, use_tqdm=False)
    llm = overlapping(model_path, max_num_batched_tokens=32, num_kv_blocks=9)
    by_hand = [llm.add_request(prompt, params) for prompt in prompts]
    with monkeypatch.context() as patch, alarms(SystemExit("time is up")):
        patch.setattr(llm.engine.scheduler, name, interrupted(getattr(llm.engine.scheduler, name), call_number))
        try:
            llm.generate([[4, 4, 4]] * 2, params, use_tqdm=False)
        except SystemExit:
            pass
        else:
            assert name == "finish" and call_number > 4
    answers, llm._undelivered = {a["request_id"]: a for a in llm._undelivered}, []
    while llm.has_unfinished_requests():
        answers |= {a["request_id"]: a for a in llm.step()}
    assert [(answers[i]["token_ids"], answers[i]["text"]) for i in by_hand] == [
        (a["token_ids"], a["text"]) for a in expected
    ]
    tidy(llm)
    llm.reset_prefix_cache()


@pytest.mark.parametrize("name", ["schedule", "update", "finish"])
def test_a_stream_that_the_collector_ends_in_the_midst_of_a_step(model_path, plain, monkeypatch, name):
    prompts, params = [[1, 2, 3], list(range(40))], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = [answer["token_ids"] for answer in plain.generate(prompts, params, use_tqdm=False)]
    llm = overlapping(model_path)
    with collector_off(), monkeypatch.context() as patch:
        abandoned_stream(llm, [7, 8, 9], replace(params, max_tokens=4))
        patch.setattr(llm.engine.scheduler, name, collecting_once(getattr(llm.engine.scheduler, name)))
        assert [answer["token_ids"] for answer in llm.generate(prompts, params, use_tqdm=False)] == expected
        assert not llm.has_unfinished_requests(), "nobody is told of the stream's answer"
    tidy(llm)


def test_an_engine_goes_when_nobody_holds_it(model_path):
    """At once, not when Python next looks for cycles: that may be while another engine captures graphs, which fails."""
    llm = LLM(model_path, dtype="float32", device="cpu", num_kv_blocks=40)
    llm.engine.overlap = Overlap(llm.engine)
    engine = weakref.ref(llm.engine)
    with collector_off():
        llm.close()
        assert engine() is None
