"""What it costs to plan a step: Python's part of the work, which grows with the number of sequences."""

import random
import statistics
import tempfile
from typing import TYPE_CHECKING

from transformers import LlamaConfig

from nanovllm import LLM
from nanovllm.bench.report import Report
from nanovllm.bench.steps import decoding
from nanovllm.bench.timing import stopwatch, watch_others

if TYPE_CHECKING:
    from nanovllm.bench import Size

BAR = 2.0  # milliseconds


def measure_planning(report: Report, size: "Size") -> None:
    """Time to schedule, prepare and update a decode step of many sequences, in the real engine with a tiny model."""
    report.progress(f"planning with {size.num_planned} sequences")
    llm = tiny_llm(size.num_planned)
    engine = llm.engine
    parts = [
        ("schedule", engine.scheduler, "schedule"),
        ("prepare", engine.model_runner.collector, "collect"),
        ("prepare", engine.model_runner, "update_tables"),
        ("prepare", engine.model_runner, "prepare"),
        ("update", engine.scheduler, "update"),
    ]
    steps = []
    with watch_others() as load, decoding(llm, size.num_planned, 64, random.Random(0)), stopwatch(parts) as seconds:
        for _ in range(size.planning_steps):
            seconds.update(dict.fromkeys(seconds, 0.0))
            llm.step()
            steps.append({name: 1000 * value for name, value in seconds.items()})
    llm.close()
    record = {
        "measurement": f"planning a step, {size.num_planned} sequences (median)",
        "dtype": "",
        "value": round(statistics.median(sum(step.values()) for step in steps), 3),
        "unit": "ms",
        "at_most": BAR,
        "milliseconds": {name: round(statistics.median(step[name] for step in steps), 3) for name in steps[0]},
    }
    report.add(record | load)


def tiny_llm(num_seqs: int) -> LLM:
    """An engine with a model so small that planning is a good part of its steps."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return LLM(folder, load_format="dummy", device="cpu", max_num_seqs=num_seqs, num_kv_blocks=8192)
