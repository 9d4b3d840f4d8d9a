"""The benchmarks behind `nanovllm bench`: the engine against the hardware's limit and against its peers.

    gpu.py        on a GPU: the benchmark that Nano-vLLM and its family share, and steps against their floors
    kernels.py    attention, backend by backend, and the sampler, on their own
    profile.py    where a step's time goes
    ranks.py      several GPUs, if there are
    serving.py    on either: many requests, against transformers' `generate` and `generate_batch`

and, where there is no GPU:

    steps.py      a step of the engine against the bare matrix products in it, and where its time goes
    planning.py   what it costs to plan a step of many sequences
    tracing.py    what it costs to record a trace
    memory.py     peak memory
    timing.py     how time is taken
    report.py     the machine, the records, the table

All sides of a comparison run in one process, with the same threads, in turns; making models and warming up is left out
for all of them. Every result is a record: a JSON line when it is there, and a row of the table at the end.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from nanovllm.bench.gpu import measure_gpu, qwen3_folder
from nanovllm.bench.memory import measure_memory
from nanovllm.bench.planning import measure_planning
from nanovllm.bench.ranks import measure_ranks
from nanovllm.bench.report import Report, environment
from nanovllm.bench.serving import measure_serving
from nanovllm.bench.steps import measure_steps
from nanovllm.bench.tracing import measure_tracing
from nanovllm.utils.hub import resolve_model


@dataclass(frozen=True)
class Size:
    """How much to measure. The defaults are what `nanovllm bench` does; a test takes less of everything."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    batch_sizes: tuple[int, ...] = (1, 4, 16, 32)
    context_len: int = 64  # tokens of each sequence when its decode step is measured
    prompt_len: int = 512  # tokens of the prefill that is measured
    profiled: tuple[tuple[int, int], ...] = ((1, 64), (32, 64), (1, 1024), (16, 1024))  # batch size, tokens of context
    step_rounds: int = 20
    num_requests: int = 48
    prompt_lens: tuple[int, int] = (16, 256)
    output_lens: tuple[int, int] = (16, 128)
    num_sharing: int = 40
    prefix_len: int = 512
    static_batch_size: int = 16
    serving_rounds: int = 2
    num_kv_blocks: int | None = None  # of the KV cache while serving; None is the engine's default
    num_planned: int = 256  # sequences when planning is measured
    planning_steps: int = 100
    num_traced: int = 64  # sequences when the cost of a trace is measured
    trace_pairs: int = 20
    gpu_batch_sizes: tuple[int, ...] = (1, 4, 16, 64, 256)
    gpu_prefills: tuple[tuple[int, int], ...] = ((1, 1024), (4, 1024), (8, 1024))  # prompts, tokens of each
    gpu_queue: tuple[int, int] = (64, 1024)  # the same, for `generate`


def run(
    model: str | Path | None = None,
    load_format: str = "auto",
    out: Path | None = None,
    size: Size = Size(),
    only_trace: bool = False,
) -> Report:
    """Measure everything on this machine; print each result as a JSON line, and a table of all at the end.

    Args:
        model: a folder, a Hugging Face repository id, or None for the default model; on a GPU, None with random weights
            is a model with the sizes of Qwen3-0.6B.
        load_format: "auto" for the model's weights, "dummy" for random ones.
        out: a file to which the JSON lines are appended as well.
        size: how much to measure.
        only_trace: nothing but what it costs to record a trace.
    """
    report = Report(out)
    with ExitStack() as stack:
        is_family = model is None and load_format == "dummy" and torch.cuda.is_available()
        if is_family:
            path = stack.enter_context(qwen3_folder())
        else:
            path = resolve_model(None if model is None else str(model))
        report.add(environment(path, load_format))
        if torch.cuda.is_available() and not only_trace:
            measure_gpu(report, path, load_format, size)
            if is_family:
                measure_ranks(report)  # models of its own, a large one, too
        else:
            measure_cpu(report, path, load_format, size, only_trace)
    print()
    for line in report.table():
        print(line)
    return report


def measure_cpu(report: Report, path: Path, load_format: str, size: Size, only_trace: bool) -> None:
    """All that is measured on a CPU: Python alone at first, while the process holds no other models and garbage."""
    measure_tracing(report, size)
    if not only_trace:
        measure_planning(report, size)
        for dtype in size.dtypes:
            measure_steps(report, path, load_format, dtype, size)
        for dtype in size.dtypes:
            measure_serving(report, path, load_format, dtype, size)
        measure_memory(report, path, load_format)
