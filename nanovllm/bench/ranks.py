"""Several GPUs: what a small model and a large one gain from one, two or more ranks, where there are as many GPUs.

A rank reads its part of the weights and of the KV cache, which is less; but the ranks talk twice in every layer, and
all of them wait for the same plan.
"""

import random
from functools import partial

import torch

from nanovllm import LLM
from nanovllm.bench.gpu import (
    QWEN3,
    SETTINGS,
    prefill_seconds,
    qwen3_folder,
    record,
    shared_both_ways,
    shared_record,
    step_seconds,
    warm_median,
)
from nanovllm.bench.report import Report
from nanovllm.bench.steps import decoding, that_fit

# The sizes of two models, as their config.json has them.
MODELS = {
    "Qwen3-0.6B": QWEN3,
    "Qwen3-8B": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
BATCH_SIZES = (1, 16, 64, 256)
CONTEXT_LEN = 1024
PREFILL = (8, 1024)  # prompts, tokens of each
ROUNDS = 20
SHARED_ROUNDS = 2  # of each way, in turns


def measure_ranks(report: Report) -> None:
    """Each model, with random weights, on one rank, on two, on four and so on; nothing where there is one GPU."""
    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        return
    for model, config in MODELS.items():
        with qwen3_folder(model, config) as path:
            for n in (1, 2, 4, 8):
                if n > num_gpus:
                    break
                name = f"{model} on {n} GPU{'s' * (n > 1)}"
                report.progress(f"{name}: starting")
                try:
                    llm = LLM(path, load_format="dummy", tensor_parallel_size=n, **SETTINGS)
                except (ValueError, RuntimeError) as error:  # too little memory, or a rank has failed
                    report.progress(f"{name}: does not fit: {error}")
                    continue
                measure_engine(report, llm, name)
                llm.close()


def measure_engine(report: Report, llm: LLM, name: str) -> None:
    """Decode steps, a prefill, and the shared benchmark: with steps that overlap, and one after the other.

    Who else uses the machine is not told: ranks are other programs.
    """
    generator = random.Random(0)
    for n in that_fit(report, llm, BATCH_SIZES, CONTEXT_LEN):
        report.progress(f"{name}: decode step, batch {n}")
        with decoding(llm, n, CONTEXT_LEN, generator):
            milliseconds = 1000 * step_seconds(llm, ROUNDS)
        report.add(record(f"{name}: decode step, batch {n}", llm, milliseconds, "ms"))

    num_prompts, prompt_len = PREFILL
    report.progress(f"{name}: prefill")
    prefill = partial(prefill_seconds, llm, num_prompts, prompt_len, generator)
    milliseconds = 1000 * warm_median(prefill, ROUNDS)
    report.add(record(f"{name}: prefill, {num_prompts} x {prompt_len} tokens", llm, milliseconds, "ms"))

    for measurement, seconds in shared_both_ways(report, llm, f"{name}: shared benchmark", SHARED_ROUNDS).items():
        report.add(shared_record(measurement, llm, seconds))
