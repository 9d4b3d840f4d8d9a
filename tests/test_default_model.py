"""The default model, a real one, answers greedily as transformers does, in every setting.

In float32, on the same prompts as the tiny models of test_engine.py.
"""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams

from .greedy import LONGEST, PROMPTS, CountingScheduler, encode, judged, run


def test_prompts_are_varied(default_model_path):
    tokenizer = LLM(default_model_path, num_kv_blocks=8).engine.tokenizer
    assert [len(encode(tokenizer, prompt)) for prompt in PROMPTS] == [prompt["num_tokens"] for prompt in PROMPTS]
    lengths = sorted(prompt["num_tokens"] for prompt in PROMPTS)
    assert len(PROMPTS) == 20 and len({p["name"] for p in PROMPTS}) == 20
    assert lengths[0] == 1 and 1400 <= lengths[-1] <= LONGEST and len(set(lengths)) >= 15
    assert any("messages" in prompt for prompt in PROMPTS)


@pytest.fixture(scope="module")
def real(default_model_path):
    tokenizer = LLM(default_model_path, num_kv_blocks=8).engine.tokenizer
    return default_model_path, [encode(tokenizer, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def real_answers(real):
    """64 tokens for each prompt, in the default setting."""
    path, prompts = real
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    return run(LLM(path), prompts, params, "together")


def test_greedy_on_the_default_model_equals_transformers(real, real_answers):
    """transformers, shown a prompt and our answer at once, would have chosen each of our tokens next.

    By induction that is what its own greedy generation gives, in a hundredth of the steps.
    """
    path, prompts = real
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for prompt, answer in zip(prompts, real_answers):
        assert len(answer) == 64
        assert judged(model, prompt, answer).argmax(-1).tolist() == answer


# Each pair of settings occurs together in one of these at least (checked below).
PAIRWISE = [
    # caching, budget, block size, tight, order
    (True, 64, 1, False, "together"),
    (False, 2048, 16, True, "shuffled"),
    (False, 16, 32, False, "one by one"),
    (True, 2048, 32, True, "together"),
    (True, 64, 16, True, "one by one"),
    (True, 16, 1, True, "shuffled"),
    (False, 16, 16, False, "together"),
    (False, 2048, 1, False, "one by one"),
    (False, 64, 32, False, "shuffled"),
]


def test_the_settings_cover_every_pair():
    values = [sorted(set(column), key=str) for column in zip(*PAIRWISE)]
    for a, b in itertools.combinations(range(5), 2):
        assert {(row[a], row[b]) for row in PAIRWISE} == set(itertools.product(values[a], values[b])), (a, b)


@pytest.mark.parametrize("caching, budget, block_size, tight, order", PAIRWISE)
def test_greedy_on_the_default_model_in_other_settings(real, real_answers, caching, budget, block_size, tight, order):
    path, prompts = real
    llm = LLM(
        path,
        max_num_batched_tokens=budget,
        block_size=block_size,
        enable_prefix_caching=caching,
        num_kv_blocks=-(-(LONGEST + 16 if tight else 8192) // block_size),
        scheduler=CountingScheduler,
    )
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    assert run(llm, prompts, params, order) == [answer[:16] for answer in real_answers]
    if tight and order == "shuffled":
        assert llm.engine.scheduler.counts["preempted"] > 0
