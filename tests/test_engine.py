"""The engine answers as transformers does, whatever it makes of the requests on the way.

Greedy decoding in float32: one wrong slot, block or position anywhere, and the tokens differ.
"""

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams

from .greedy import LONGEST, PROMPTS, CountingScheduler, encode, run

# -- Tiny models: every setting with every other -----------------------------------------------------------------------

TINY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module", params=["tiny_qwen3_path", "tiny_llama_path"])
def tiny(request):
    """A tiny model, the prompts as its tokens, and what transformers answers to each."""
    path = request.getfixturevalue(request.param)
    tokenizer = LLM(path, num_kv_blocks=8).engine.tokenizer
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    # A byte is a token here, so the texts are cut: each prompt is as long as it is for the default model.
    prompts = [encode(tokenizer, prompt)[: prompt["num_tokens"]] for prompt in PROMPTS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, min_new_tokens=16,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        expected.append(output[0, len(prompt) :].tolist())
    return path, prompts, expected


@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize("budget", [16, 64, 2048])
def test_greedy_matrix_on_tiny_models(tiny, budget, block_size):
    path, prompts, expected = tiny
    orders = ("one by one", "together", "shuffled")
    for caching, tight, order in itertools.product([True, False], [True, False], orders):
        num_tokens = LONGEST + TINY.max_tokens if tight else 16_384
        llm = LLM(
            path,
            max_num_batched_tokens=budget,
            block_size=block_size,
            enable_prefix_caching=caching,
            num_kv_blocks=-(-num_tokens // block_size),
            scheduler=CountingScheduler,
        )
        # One by one takes the most steps, so a few tokens each must do.
        params = replace(TINY, max_tokens=6) if order == "one by one" else TINY
        answers = run(llm, prompts, params, order)
        assert answers == [tokens[: params.max_tokens] for tokens in expected], f"{order}, {caching=}, {tight=}"
        counts = llm.engine.scheduler.counts
        assert counts["chunked"] or budget == 2048
        assert counts["cached"] or not caching
        assert counts["mixed"] or order == "one by one" or budget == 2048
        assert counts["preempted"] or not (tight and order == "shuffled")
        assert tight or not counts["preempted"]


@pytest.mark.parametrize("caching", [True, False])
def test_much_preemption(tiny, caching):
    """Most answers are interrupted, and nobody notices."""
    path, prompts, _ = tiny
    prompts = [prompt for prompt in prompts if len(prompt) < 150]
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    roomy = LLM(path, num_kv_blocks=1024)
    tight = LLM(path, num_kv_blocks=64, block_size=4, enable_prefix_caching=caching, scheduler=CountingScheduler)
    assert run(tight, prompts, params, "together") == run(roomy, prompts, params, "together")
    assert tight.engine.scheduler.counts["preempted"] > len(prompts) // 2


@pytest.mark.parametrize("max_num_seqs", [1, 3])
def test_few_sequences_at_a_time(tiny, max_num_seqs):
    path, prompts, expected = tiny
    llm = LLM(path, max_num_seqs=max_num_seqs, num_kv_blocks=512)
    assert run(llm, prompts, TINY, "together") == expected


def test_requests_that_come_and_go_at_any_time(tiny):
    """Added by hand in the middle of things, some aborted, in a cache that is too small."""
    path, prompts, expected = tiny
    rng = random.Random(1)
    llm = LLM(path, max_num_batched_tokens=64, num_kv_blocks=96, scheduler=CountingScheduler)
    ids: dict[int, int] = {}
    aborted = 0
    for _ in range(5):
        for i in rng.sample(range(20), 20):
            ids[llm.add_request(prompts[i], TINY)] = i
            for _ in range(rng.randrange(4)):
                check(llm.step(), ids, expected)
            if rng.random() < 0.2 and llm.engine.requests:
                llm.abort(rng.choice(list(llm.engine.requests)))
                aborted += 1
    while llm.has_unfinished_requests():
        check(llm.step(), ids, expected)
    assert aborted >= 5 and llm.engine.scheduler.counts["preempted"] > 0
    assert len(llm.engine.block_manager.free) == 96


def check(outputs: Iterable[dict], ids: dict[int, int], expected: list[list[int]]) -> None:
    for output in outputs:
        assert output["token_ids"] == expected[ids[output["request_id"]]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_both_dtypes_run(model_path, dtype):
    """In bfloat16 another order of summation may rightly give other tokens; the first ones must still be plausible."""
    llm = LLM(model_path, dtype=dtype, num_kv_blocks=64)
    exact = LLM(model_path, num_kv_blocks=64)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5, ignore_eos=True)
    for output, reference in zip(*(x.generate(["Hello", "there"], params, use_tqdm=False) for x in (llm, exact))):
        (token_id,) = output["token_ids"]
        best = max(reference["logprobs"][0].values())
        assert reference["logprobs"][0].get(token_id, -99) > best - 0.1
