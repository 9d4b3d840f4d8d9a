"""The prompts of the greedy tests, and how they are run."""

import json
import random
from pathlib import Path

import torch
from transformers import PreTrainedModel

from nanovllm import LLM, SamplingParams
from nanovllm.engine.scheduler import Scheduler

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


def judged(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The logits from which transformers would choose each token of an answer, shown it and the prompt at once."""
    token_ids = torch.tensor([prompt + answer], device=model.device)
    with torch.inference_mode():
        return model(token_ids, logits_to_keep=len(answer) + 1).logits[0, :-1]


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
