"""What a CUDA graph records, run on a CPU: a graph's replay is then a plain call of what it would have recorded.

So the buffers, the padding and the tokens that are still in flight are tested without a GPU; tests/gpu records for
real.
"""

import itertools
import sys
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine import buckets, cuda_graphs, model_runner
from nanovllm.engine.buckets import BUCKETS, PIECEWISE_BUCKETS, bucket_of
from nanovllm.engine.overlap import Overlap
from nanovllm.engine.step_inputs import IN_FLIGHT
from nanovllm.kernels import torch_attention
from nanovllm.lessons.chapter_05 import Recorder, in_the_place_of_cuda_graphs
from tests import flash_stand_in

from .conftest import collector_off


class Tape(Recorder):
    """A piece of a graph: its operators are noted, and carried out again into the same memory."""

    def capture_begin(self, pool):
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)


@pytest.fixture
def replaying(model_path, monkeypatch):
    """Makes engines on a CPU whose steps go through `StepGraphs`, greedily."""

    @torch.inference_mode()
    def capture(self, device, is_trial):
        for bucket in self.piecewise.buckets:
            self.inputs[2 * bucket : 3 * bucket] = self.padding_row
            self.piecewise.capture(bucket, stream=None)
        for buckets, graphs, run in (
            (self.buckets, self.graphs, cuda_graphs.StepGraphs.run_model),
            (self.sample_buckets, self.sample_graphs, cuda_graphs.StepGraphs.run_sampler),
        ):
            for bucket in buckets:
                replay = partial(run, weakref.proxy(self), bucket)
                graphs[bucket] = SimpleNamespace(replay=torch.inference_mode()(replay))

    monkeypatch.setattr(cuda_graphs.StepGraphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(cuda_graphs, "pinned", torch.from_numpy)
    greedy = lambda logits, temperature, keys: logits.argmax(dim=-1)  # noqa: E731
    monkeypatch.setitem(sys.modules, "nanovllm.kernels.triton_sampler", SimpleNamespace(sample=greedy))

    def make(overlaps: bool, **settings) -> LLM:
        llm = LLM(model_path, dtype="float32", device="cpu", **settings)
        runner = llm.engine.model_runner
        runner.graphs = runner.capture_graphs(llm.engine.config, runner.block_tables.shape[1])
        llm.engine.overlap = Overlap(llm.engine) if overlaps else None
        return llm

    return make


GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [list(range(start, start + n)) for start, n in ((0, 70), (5, 3), (0, 40), (9, 41), (1, 8), (0, 100), (7, 16))]


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("budget", [16, 24, 600])  # the last one takes each prompt whole
def test_the_same_tokens(replaying, model_path, overlaps, budget):
    """Decodes, chunks, mixed and preempted: each bucket's padding, and prompts that share blocks."""
    plain = LLM(model_path, dtype="float32", device="cpu")
    expected = [a["token_ids"] for a in plain.generate(PROMPTS, GREEDY, use_tqdm=False)]
    llm = replaying(overlaps, num_kv_blocks=14, max_num_batched_tokens=budget, max_num_seqs=5)
    assert [a["token_ids"] for a in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == expected
    assert len(llm.engine.block_manager.free) == 14


@pytest.mark.parametrize("overlaps", [False, True])
def test_sequences_that_grow_as_long_as_they_may(replaying, model_path, overlaps):
    """Their tables are full to the last place, and with overlap a step more is launched before their end is known."""
    settings = dict(max_model_len=75, max_num_seqs=3)  # five blocks of 16, the last not full
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[4]]
    plain = LLM(model_path, dtype="float32", device="cpu", **settings)
    expected = plain.generate(prompts, params, use_tqdm=False)
    llm = replaying(overlaps, num_kv_blocks=15, **settings)
    answers = llm.generate(prompts, params, use_tqdm=False)
    assert [len(p) + len(a["token_ids"]) for p, a in zip(prompts, answers)] == [75, 75, 75]
    assert [(a["token_ids"], a["finish_reason"]) for a in answers] == [(a["token_ids"], "length") for a in expected]
    assert len(llm.engine.block_manager.free) == 15


@pytest.fixture
def no_pieces(monkeypatch):
    """Steps of more than 512 tokens run eagerly, as those of more than 8,192 do: so many are slow to test on a CPU."""
    monkeypatch.setattr(buckets, "PIECEWISE_BUCKETS", [0])  # no step is so small
    monkeypatch.setattr(cuda_graphs, "piecewise_buckets_up_to", lambda most, longest: [])


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_large_step(request, replaying, model_path, in_pieces, overlaps):
    """Long prompts beside those who decode: the tokens of these are in flight, and looked up without a graph, too."""
    if not in_pieces:
        request.getfixturevalue("no_pieces")
    prompts = [[1, 2, 3], [i % 250 for i in range(900)], [i % 241 for i in range(9, 909)]]
    plain = LLM(model_path, dtype="float32", device="cpu")
    expected = [a["token_ids"] for a in plain.generate(prompts, GREEDY, use_tqdm=False)]
    llm = replaying(overlaps, num_kv_blocks=130, max_num_batched_tokens=600)
    run, in_flight = llm.engine.model_runner.run, []

    def watched(inputs):
        launched = run(inputs)
        if len(inputs.input_ids) > BUCKETS[-1]:
            assert launched.graph == ({"bucket": 640, "padding": 40, "in_pieces": True} if in_pieces else None)
            in_flight.append(int((inputs.input_ids == IN_FLIGHT).sum()))
        return launched

    llm.engine.model_runner.run = watched
    assert [a["token_ids"] for a in llm.generate(prompts, GREEDY, use_tqdm=False)] == expected
    assert in_flight == ([0, 1, 2] if overlaps else [0, 0, 0])


@pytest.mark.parametrize("overlaps", [False, True])
def test_small_steps_in_pieces(replaying, model_path, monkeypatch, overlaps):
    """Chunks, here all of more than a few tokens, beside decodes, whose tokens may be in flight."""
    asked = []

    def rule(num_tokens, chunks):
        asked.append((num_tokens, chunks))
        return sum(n for n, _ in chunks) > 10

    monkeypatch.setattr(model_runner, "takes_pieces", rule)
    every_size = lambda most, longest: [size for size in PIECEWISE_BUCKETS if size <= 128]  # noqa: E731
    monkeypatch.setattr(cuda_graphs, "piecewise_buckets_up_to", every_size)
    plain = LLM(model_path, dtype="float32", device="cpu")
    expected = [a["token_ids"] for a in plain.generate(PROMPTS, GREEDY, use_tqdm=False)]
    llm = replaying(overlaps, max_num_batched_tokens=72)
    run, seen = llm.engine.model_runner.run, set()

    def watched(inputs):
        launched, num_tokens = run(inputs), len(inputs.input_ids)
        chunks = [(n, length) for n, length in zip(inputs.num_new, inputs.context_lens) if n > 1]
        assert asked == [(num_tokens, chunks)]
        in_pieces = sum(n for n, _ in chunks) > 10
        asked.clear()
        bucket = bucket_of(num_tokens, in_pieces)
        assert launched.graph == {"bucket": bucket, "padding": bucket - num_tokens, "in_pieces": in_pieces}
        seen.add((in_pieces, len(set(inputs.num_new)) > 1, bool((inputs.input_ids == IN_FLIGHT).any())))
        return launched

    llm.engine.model_runner.run = watched
    assert [a["token_ids"] for a in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == expected
    assert {(True, True, overlaps), (False, False, overlaps)} <= seen


LONG = [[i % 250 for i in range(start, start + n)] for start, n in ((0, 600), (0, 530), (3, 255), (8, 1), (9, 300))]


@pytest.mark.parametrize("has_graphs", [True, False])
@pytest.mark.parametrize("budget", [40, 700])  # chunks beside decodes; prompts that share their first two blocks
def test_the_flash_attention_backend_gives_the_same_tokens(replaying, model_path, monkeypatch, has_graphs, budget):
    """Its wiring, over a stand-in that takes float32, too, so that tokens can be compared."""
    plain = LLM(model_path, dtype="float32", device="cpu")
    expected = [a["token_ids"] for a in plain.generate(LONG, GREEDY, use_tqdm=False)]
    monkeypatch.setattr(flash_stand_in, "DTYPES", (torch.float32,))
    monkeypatch.setattr("nanovllm.engine.model_runner.choose_backend", lambda *args: flash_stand_in.backend())
    settings = dict(block_size=256, num_kv_blocks=9, max_num_batched_tokens=budget, max_num_seqs=4)
    llm = replaying(False, **settings) if has_graphs else LLM(model_path, dtype="float32", device="cpu", **settings)
    if has_graphs and budget == 40:  # all rows are decodes: no chunk may be planned, which reads a number from the GPU
        monkeypatch.setattr(flash_stand_in.backend(), "flash_attn_varlen_func", None)
    assert [a["token_ids"] for a in llm.generate(LONG, GREEDY, use_tqdm=False)] == expected


@pytest.mark.parametrize("prompt_lens, bucket", [([], 8), ([580], 576)])  # five decodes; a prompt beside them
def test_padding_writes_to_the_dummy_block_alone(replaying, prompt_lens, bucket):
    llm = replaying(False, num_kv_blocks=100, max_num_batched_tokens=600)
    for prompt in PROMPTS[:5]:
        llm.add_request(prompt, GREEDY)
    for _ in range(4):
        llm.step()
    for n in prompt_lens:
        llm.add_request([i % 250 for i in range(9, 9 + n)], GREEDY)
    cache = llm.engine.model_runner.kv_cache  # [2, layers, blocks, block_size, kv_heads, head_dim]
    before = cache.clone()
    batch, _ = llm.engine.step()
    assert bucket_of(batch.num_tokens) == bucket > batch.num_tokens
    changed = (before != cache).flatten(4).any(dim=-1).any(dim=0).any(dim=0)  # [blocks, block_size]
    assert changed[:-1].sum() == batch.num_tokens


def test_a_table_is_changed_where_it_has_changed(replaying):
    """Rows are used again by others; what the last one left behind its own end is never followed."""
    llm = replaying(False, num_kv_blocks=60, max_num_seqs=2)
    graphs, runner = llm.engine.model_runner.graphs, llm.engine.model_runner
    for prompt in PROMPTS:
        llm.add_request(prompt, GREEDY)
    while llm.has_unfinished_requests():
        llm.step()
        for seq in llm.engine.scheduler.running:
            table = graphs.block_tables[seq.row, : len(seq.block_table)].tolist()
            known = runner.collector.num_told_blocks[seq.row]
            assert table[:known] == seq.block_table[:known]
    assert (graphs.block_tables[-1] == 60).all()  # the row for padding leads to the dummy block


def test_a_recording_that_fails_is_ended_and_says_why(replaying, monkeypatch):
    """Else its stream would go on recording, and layers not attending; and CUDA complains of the broken end."""
    graphs = replaying(False, num_kv_blocks=60, max_num_batched_tokens=600).engine.model_runner.graphs
    backends, store = [layer.backend for layer in graphs.piecewise.layers], torch_attention.store
    monkeypatch.setattr(torch_attention, "store", fails_the_fourth_time(store))  # recording, in the second layer
    ended = []

    def capture_end(self):
        self.__exit__(None, None, None)
        ended.append(self)
        if len(ended) == 2:
            raise RuntimeError("the recording is broken")

    monkeypatch.setattr(Tape, "capture_end", capture_end)
    with pytest.raises(RuntimeError, match="no memory left"):
        graphs.piecewise.capture(576, stream=None)
    assert ended == graphs.piecewise.pieces[576] and len(ended) == 2
    assert [layer.backend for layer in graphs.piecewise.layers] == backends


def fails_the_fourth_time(function):
    calls = itertools.count(1)

    def call(*args):
        if next(calls) == 4:
            raise RuntimeError("no memory left")
        return function(*args)

    return call


@pytest.mark.parametrize("is_trial", [False, True])
def test_the_largest_graphs_are_recorded_first_with_a_bar(model_path, monkeypatch, is_trial):
    """The smaller ones then find room in their memory. A trial, which tells how much that is, takes one a kind."""
    llm = LLM(model_path, num_kv_blocks=60, max_num_batched_tokens=600, max_num_seqs=9, device="cpu")
    runner, shown = llm.engine.model_runner, []

    def bar(todo, *, disable, **_):
        assert disable == is_trial
        for capture, bucket in todo:
            shown.append((capture.__name__, bucket))
            yield capture, bucket

    with in_the_place_of_cuda_graphs(Tape):
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(cuda_graphs, "tqdm", bar)
        graphs = runner.capture_graphs(llm.engine.config, runner.block_tables.shape[1], is_trial)
    kinds = {
        "capture": [640, 576, 512, 384, 256, 128],  # pieces
        "capture_model": BUCKETS[::-1],
        "capture_sampler": [16, 8, 4, 2, 1],
    }
    assert shown == [(name, bucket) for name, sizes in kinds.items() for bucket in sizes[: 1 if is_trial else None]]
    assert graphs.num_sizes == len(shown) and graphs.seconds > 0
    assert len(graphs.piecewise.pieces[640]) == len(graphs.piecewise.layers) + 1


# Megabytes on H100s, with the sizes of Qwen3-0.6B (2026-11-27): what the largest graphs of each kind took with all
# buffers, and what all graphs took in the end.
TAKEN = [(1, 16_384, 430, 709), (2, 16_384, 396, 1483), (4, 16_384, 342, 1428), (2, 512, 256, 879), (4, 512, 222, 843)]


@pytest.mark.parametrize("num_ranks, budget, largest, taken", TAKEN)
def test_what_is_reserved_for_graphs_was_enough_where_it_was_measured(num_ranks, budget, largest, taken):
    pieces = SimpleNamespace(buckets=buckets.piecewise_buckets_up_to(budget, longest=4096), layers=[None] * 28)
    sizes = dict(buckets=buckets.buckets_up_to(budget), sample_buckets=buckets.buckets_up_to(256))
    graphs = SimpleNamespace(piecewise=pieces, **sizes)
    reserved = largest + cuda_graphs.StepGraphs.bytes_kept_by_cuda(graphs, num_ranks) / 1e6
    assert 1.1 * taken < reserved < 1.4 * taken


def test_closing_lets_go_of_graphs_at_once(replaying):
    """Not when Python next looks for circles: the memory is wanted by the engine that comes after."""
    llm = replaying(False, num_kv_blocks=60, max_num_batched_tokens=600)
    llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    held = weakref.ref(llm.engine.model_runner.graphs), weakref.ref(llm.engine.model_runner.graphs.piecewise)
    with collector_off():
        llm.close()
        assert [ref() for ref in held] == [None, None]


def test_a_trace_tells_which_graph_was_replayed(replaying):
    llm = replaying(False, num_kv_blocks=60, max_num_batched_tokens=600)
    with llm.trace() as trace:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    prefill, decode = trace.steps[:2]
    assert prefill.num_tokens == 182  # the rest is shared
    assert prefill.graph == {"bucket": 184, "padding": 2, "in_pieces": False}
    assert decode.graph == {"bucket": 8, "padding": 1, "in_pieces": False}
    with llm.trace() as trace:
        llm.generate([[9] * 300], GREEDY, use_tqdm=False)
    assert trace.steps[0].graph == {"bucket": 384, "padding": 84, "in_pieces": True}
    with llm.trace() as trace:
        llm.generate([[i % 250 for i in range(7, 600)]], GREEDY, use_tqdm=False)
    buckets = [(640, 63, True), (1, 0, False)]
    assert [tuple(step.graph.values()) for step in trace.steps[:2]] == buckets
