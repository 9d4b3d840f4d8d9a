"""A step replayed from a CUDA graph gives what the same step gives without one."""

import random

import numpy as np
import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.cuda_graphs import copied
from nanovllm.engine.overlap import Overlap


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def pair(request):
    """The same engine with graphs and without."""
    path = request.getfixturevalue(f"tiny_{request.param}_path")
    settings = dict(dtype="float32", device="cuda", num_kv_blocks=400, max_num_batched_tokens=600, max_num_seqs=40)
    llms = LLM(path, **settings), LLM(path, enforce_eager=True, **settings)
    assert llms[0].engine.model_runner.graphs is not None and llms[1].engine.model_runner.graphs is None
    yield llms
    for llm in llms:
        llm.close()


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("num_seqs", [1, 2, 3, 5, 8, 12, 20, 37, 40])
def test_greedy_tokens_are_the_same_for_every_number_of_sequences(pair, num_seqs):
    prompts = prompts_of([random.Random(num_seqs).randint(1, 60) for _ in range(num_seqs)], seed=num_seqs)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    answers = [[a["token_ids"] for a in llm.generate(prompts, params, use_tqdm=False)] for llm in pair]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "lengths", [[300], [384], [30] * 12, [600], [530], [700, 5, 3], [300, 200, 40, 9, 2], [5, 3, 590, 1200, 7]]
)
def test_long_prompts_replay_in_pieces(pair, monkeypatch, lengths):
    """Alone, several in a step, in chunks beside decodes; with padding and without."""
    pieces, num_replays = pair[0].engine.model_runner.graphs.piecewise, 0

    def replay(*args, replay=pieces.replay):
        nonlocal num_replays
        num_replays += 1
        return replay(*args)

    monkeypatch.setattr(pieces, "replay", replay)
    prompts = prompts_of(lengths, seed=sum(lengths))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    answers = []
    for llm in pair:
        with llm.trace() as trace:
            answers.append([a["token_ids"] for a in llm.generate(prompts, params, use_tqdm=False)])
        assert all((step.graph is None) == (llm is pair[1]) for step in trace.steps)
    assert num_replays >= 1 + (sum(lengths) > 1200)
    assert answers[0] == answers[1]


def test_sampled_tokens_are_the_same_whoever_else_is_in_the_batch(pair):
    """Plain sampling, truncated sampling and log-probabilities, mixed and each alone."""
    params = [
        SamplingParams(temperature=0.8, seed=1, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=1.0, top_p=0.8, seed=2, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=1.3, seed=4, max_tokens=12, ignore_eos=True),
    ]
    prompts = prompts_of([5, 17, 33, 2, 9])
    together = [[a["token_ids"] for a in llm.generate(prompts, params, use_tqdm=False)] for llm in pair]
    alone = [pair[0].generate([p], [s], use_tqdm=False)[0]["token_ids"] for p, s in zip(prompts, params)]
    assert together[0] == together[1] == alone


def test_chunks_preemption_and_sharing_replay_too(tiny_qwen3_path):
    """A pool so small that sequences are preempted, a budget so small that prompts come in chunks: mixed steps."""
    settings = dict(dtype="float32", device="cuda", num_kv_blocks=30, max_num_batched_tokens=24, max_num_seqs=8)
    prompts = prompts_of([70, 3, 40, 41, 8, 100, 16, 17]) + [prompts_of([70])[0] + [1, 2, 3]]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    answers = []
    for enforce_eager in (False, True):
        llm = LLM(tiny_qwen3_path, enforce_eager=enforce_eager, **settings)
        with llm.trace() as trace:
            answers.append([a["token_ids"] for a in llm.generate(prompts, params, use_tqdm=False)])
        assert any(step.preempted for step in trace.steps)
        assert any(
            len(step.scheduled) > 1 and max(s.num_new_tokens for s in step.scheduled) > 1 for step in trace.steps
        )
        llm.close()
    assert answers[0] == answers[1]


def test_graphs_outlive_those_of_another_engine(tiny_qwen3_path, tiny_llama_path):
    """What cuBLAS needs in a graph is that graph's own, also when the other engine's memory is somebody else's."""
    settings = dict(dtype="bfloat16", device="cuda", num_kv_blocks=100, max_num_seqs=16)
    prompts, params = prompts_of([5, 60, 33]), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engines = [LLM(path, **settings) for path in (tiny_qwen3_path, tiny_llama_path, tiny_qwen3_path)]
    expected = [[a["token_ids"] for a in llm.generate(prompts, params, use_tqdm=False)] for llm in engines]
    while engines:
        engines.pop(0).close()
        expected.pop(0)
        filled = torch.full((1 << 28,), torch.nan, device="cuda")  # a gigabyte
        for llm, answers in zip(engines, expected):
            llm.reset_prefix_cache()
            assert [a["token_ids"] for a in llm.generate(prompts, params, use_tqdm=False)] == answers
        del filled


def test_padding_of_pieces_touches_nobody(pair):
    """Two prompts of 265 tokens, padded to 576 rows."""
    llm = pair[0]
    llm.reset_prefix_cache()
    cache = llm.engine.model_runner.kv_cache
    before = cache.clone()
    for prompt in prompts_of([265, 265], seed=1):
        llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=1))
    llm.step()
    changed = (before != cache).any(dim=-1).any(dim=-1).any(dim=0).any(dim=0)  # [blocks, block_size]
    assert changed[:-1].sum() == 530


def test_padding_touches_nobody(pair):
    """Nine tokens are padded to sixteen: what is in the KV cache of others stays as it is, bit for bit."""
    llm = pair[0]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    for prompt in prompts_of([20] * 9):
        llm.add_request(prompt, params)
    llm.step()
    cache = llm.engine.model_runner.kv_cache
    for _ in range(5):
        before = cache.clone()
        batch, _ = llm.engine.step()
        changed = (before != cache).any(dim=-1).any(dim=-1).any(dim=0).any(dim=0)  # [blocks, block_size]
        assert changed[:-1].sum() <= 9  # the last block is the dummy
    for request_id in list(llm.engine.requests):
        llm.abort(request_id)


def test_what_is_written_later_reaches_no_copy_that_still_waits():
    """The memory that a GPU copies from by itself is not lent again before it has."""
    copied(np.zeros(1000), torch.device("cuda"))
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # half a second, before which nothing below begins
    copies = [copied(np.full(1000, i), torch.device("cuda")) for i in range(100)]
    assert not torch.cuda.current_stream().query(), "the GPU woke up too early: nothing was tested"
    assert [copy.unique().tolist() for copy in copies] == [[i] for i in range(100)]


def test_a_gpu_that_lags_behind_gives_the_same(pair, monkeypatch):
    """Python plans and writes the next step while the GPU has not begun this one."""
    llm = pair[0]
    runner = llm.engine.model_runner
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=10 + i, ignore_eos=True) for i in range(20)]
    prompts = prompts_of([1 + 7 * i for i in range(19)] + [590], seed=2)  # also in pieces
    llm.reset_prefix_cache()
    expected = [a["token_ids"] for a in llm.generate(prompts, params, use_tqdm=False)]

    def run(inputs, run=runner.run):
        torch.cuda._sleep(10**8)  # 50 ms
        launched = run(inputs)
        waiting.append(not torch.cuda.current_stream().query())
        return launched

    waiting: list[bool] = []
    monkeypatch.setattr(runner, "run", run)
    llm.reset_prefix_cache()
    assert [a["token_ids"] for a in llm.generate(prompts, params, use_tqdm=False)] == expected
    assert all(waiting) and len(waiting) > 30


def test_steps_overlap_and_give_the_same(tiny_qwen3_path):
    """Greedy and seeded, chunks and preemption: with the next step launched before the last one's tokens are known."""
    settings = dict(dtype="float32", device="cuda", num_kv_blocks=30, max_num_batched_tokens=24, max_num_seqs=8)
    prompts = prompts_of([70, 3, 40, 41, 8, 100, 16, 17], seed=5)
    params = [
        SamplingParams(temperature=t, top_p=p, seed=i, max_tokens=40, stop_token_ids=list(range(20)))
        for i, (t, p) in enumerate([(0, 1.0), (1.0, 1.0), (1.0, 0.9), (0, 1.0)] * 2)
    ]
    answers = []
    for overlaps in (True, False):
        llm = LLM(tiny_qwen3_path, **settings)
        llm.engine.overlap = Overlap(llm.engine) if overlaps else None
        answers.append([a["token_ids"] for a in llm.generate(prompts, params, use_tqdm=False)])
        assert len(llm.engine.block_manager.free) == 30
        llm.close()
    assert answers[0] == answers[1]
