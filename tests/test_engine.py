"""The engine answers as transformers does, whatever it makes of the requests on the way.

Greedy decoding in float32: one wrong slot, block or position anywhere, and the tokens differ.
"""

import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.engine.scheduler import Scheduler
from nanovllm.utils.checkpoint import load_tokenizer
from nanovllm.utils.hub import resolve_model

PROMPTS = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))
LONGEST = 1500


class CountingScheduler(Scheduler):
    """Counts what happened, so that a test can say that it did."""

    def __init__(self, config, block_manager):
        super().__init__(config, block_manager)
        self.counts = {"preempted": 0, "cached": 0, "chunked": 0, "mixed": 0}

    def schedule(self):
        batch = super().schedule()
        self.counts["preempted"] += len(batch.preempted)
        self.counts["cached"] += sum(seq.num_cached_tokens > 0 for seq in batch.admitted)
        self.counts["chunked"] += sum(not s.samples for s in batch.scheduled)
        kinds = {s.num_computed_tokens >= s.seq.num_prompt_tokens for s in batch.scheduled}
        self.counts["mixed"] += len(kinds) == 2
        return batch


def encode(tokenizer, prompt) -> list[int]:
    text = prompt.get("text")
    if text is None:
        text = tokenizer.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text)[:LONGEST]


def run(llm: LLM, prompts: list[list[int]], params: SamplingParams, order: str) -> list[list[int]]:
    """The tokens for each prompt, asked for one by one, all together, or all together in another order."""
    if order == "one by one":
        return [llm.generate([prompt], params, use_tqdm=False)[0]["token_ids"] for prompt in prompts]
    indices = list(range(len(prompts)))
    if order == "shuffled":
        random.Random(5).shuffle(indices)  # an order in which a tight cache makes the engine preempt
    outputs = llm.generate([prompts[i] for i in indices], params, use_tqdm=False)
    tokens = {i: output["token_ids"] for i, output in zip(indices, outputs)}
    return [tokens[i] for i in range(len(prompts))]


def test_prompts_are_varied(default_model_path):
    tokenizer = LLM(default_model_path, num_kv_blocks=8).engine.tokenizer
    lengths = sorted(len(encode(tokenizer, prompt)) for prompt in PROMPTS)
    assert len(PROMPTS) == 20 and len({p["name"] for p in PROMPTS}) == 20
    assert lengths[0] == 1 and 1400 <= lengths[-1] <= LONGEST and len(set(lengths)) >= 15
    assert any("messages" in prompt for prompt in PROMPTS)


# -- Tiny models: every setting with every other -------------------------------------------------------------------------

TINY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module", params=["tiny_qwen3_path", "tiny_llama_path"])
def tiny(request):
    """A tiny model, the prompts as its tokens, and what transformers answers to each."""
    path = request.getfixturevalue(request.param)
    tokenizer = LLM(path, num_kv_blocks=8).engine.tokenizer
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    # A byte is a token here, so the texts are cut: each prompt is as long as it is for the default model.
    lengths = [len(encode(load_tokenizer(resolve_model(None)), prompt)) for prompt in PROMPTS]
    prompts = [encode(tokenizer, prompt)[:length] for prompt, length in zip(PROMPTS, lengths)]
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


# -- The default model: a real one ---------------------------------------------------------------------------------------


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
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer]), logits_to_keep=65).logits[0, :-1]
        assert logits.argmax(-1).tolist() == answer


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
