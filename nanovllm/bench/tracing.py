"""What it costs to record a trace, as a share of a step."""

import random
import statistics
from time import perf_counter
from typing import TYPE_CHECKING

from nanovllm import LLM
from nanovllm.bench.planning import tiny_llm
from nanovllm.bench.report import Report
from nanovllm.bench.steps import decoding
from nanovllm.bench.timing import watch_others

if TYPE_CHECKING:
    from nanovllm.bench import Size

BAR = 5.0  # percent
TURNS, STEPS = 4, 5  # a pair is so many turns of so many steps without a trace and with one


def measure_tracing(report: Report, size: "Size") -> None:
    """Decode steps of many sequences on a tiny model, by turns without a trace and with one open.

    Opening and closing are not counted. A pair is some steps of either kind; its cost is the ratio of their medians.
    Reported are the median of all pairs and the interval that holds the middle half of them.
    """
    report.progress(f"recording a trace of {size.num_traced} sequences")
    llm = tiny_llm(size.num_traced)
    costs, steps = [], []
    with watch_others() as load, decoding(llm, size.num_traced, 64, random.Random(0)):
        for _ in range(size.trace_pairs):
            without, traced = [], []
            for _ in range(TURNS):
                without += step_seconds(llm)
                with llm.trace():
                    traced += step_seconds(llm)
            costs.append(100 * (statistics.median(traced) / statistics.median(without) - 1))
            steps.append(1000 * statistics.median(without))
    llm.close()
    low, median, high = statistics.quantiles(costs, n=4)
    record = {
        "measurement": f"recording a trace, {size.num_traced} sequences (median of {size.trace_pairs} pairs)",
        "dtype": "",
        "value": round(median, 2),
        "unit": "% of the step",
        "at_most": BAR,
        "interval": [round(low, 2), round(high, 2)],  # quartiles
        "milliseconds": {"step": round(statistics.median(steps), 3)},
    }
    report.add(record | load)


def step_seconds(llm: LLM) -> list[float]:
    """Seconds of each of a few steps. The first is not counted: opening or closing a trace has emptied the caches."""
    times = [perf_counter()]
    for _ in range(STEPS + 1):
        llm.step()
        times.append(perf_counter())
    return [end - start for start, end in zip(times[1:], times[2:])]
