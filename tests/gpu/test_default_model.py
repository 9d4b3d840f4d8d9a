"""The default model, a real one, answers greedily on a GPU as transformers does there, in every number format."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.utils.hub import ModelUnavailableError, resolve_model

from ..greedy import PROMPTS, encode, judged, run

GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)

# How far below the best logit in float32, which is some 27, that of a token may lie which rounding made the best.
CLOSE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.5}


@pytest.fixture(scope="module")
def path():
    try:
        return resolve_model(None)
    except ModelUnavailableError as error:  # a GPU is often lent without a network
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def judge(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to("cuda")


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_greedy_on_the_default_model_equals_transformers(path, judge, dtype, enforce_eager):
    """transformers, shown a prompt and our answer at once, would have chosen each of our tokens next, or nearly."""
    llm = LLM(path, device="cuda", dtype=dtype, enforce_eager=enforce_eager, num_kv_blocks=1000)
    prompts = [encode(llm.engine.tokenizer, prompt) for prompt in PROMPTS]
    answers = run(llm, prompts, GREEDY, "together")
    llm.close()
    worst = 0.0
    for prompt, answer in zip(prompts, answers):
        logits = judged(judge, prompt, answer)
        chosen = logits[range(len(answer)), answer]
        worst = max(worst, (logits.amax(1) - chosen).max().item())
    assert worst < CLOSE[dtype]
