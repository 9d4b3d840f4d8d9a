"""A step of the engine against its floor: the time of the bare matrix products in it.

A decode step must read every weight once and does little with it, so its products alone, `F.linear` after `F.linear`
with nothing in between, tell how fast an engine could be. What a step takes beyond them is attention, norms, rotations,
sampling, planning and Python. A speed of 1 means that all of this costs nothing, or that the engine's own products, on
packed weights, make up for it.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm import LLM, SamplingParams
from nanovllm.bench.report import Report
from nanovllm.bench.timing import best_of, stopwatch, watch_others
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import LMHead
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Linear

if TYPE_CHECKING:
    from nanovllm.bench import Size

# What to reach, as speed over the floor.
DECODE_BARS = {"float32": {1: 1.0, 4: 1.0, 16: 1.0, 32: 1.0}, "bfloat16": {1: 0.8, 4: 0.8, 16: 0.8, 32: 0.75}}
PREFILL_BARS = {"float32": 0.9, "bfloat16": 0.55}

# Tokens that each sequence may get while others' prompts are computed and steps are measured.
MORE_TOKENS = 64


class Floor:
    """A model's matrix products and nothing else, merged as in the model: query, key and value; gate and up."""

    def __init__(self, model: nn.Module) -> None:
        linears = [module for module in model.modules() if isinstance(module, Linear)]
        self.is_head = [isinstance(linear, LMHead) for linear in linears]
        self.packed = [linear.packed for linear in linears]  # None where weights cannot be packed
        self.weights = [linear.weight if linear.packed is None else linear.packed.to_dense() for linear in linears]

    def sides(self, num_tokens: int, num_sampled: int) -> dict[str, Callable[[], None]]:
        """The products of a step of so many tokens, plain and prepacked; the head has rows for sampled tokens only."""
        shapes = [(num_sampled if is_head else num_tokens, w.size(1)) for is_head, w in zip(self.is_head, self.weights)]
        inputs = {shape: torch.randn(shape, dtype=self.weights[0].dtype) for shape in shapes}

        @torch.inference_mode()
        def plain() -> None:
            for shape, weight in zip(shapes, self.weights):
                F.linear(inputs[shape], weight)

        @torch.inference_mode()
        def prepacked() -> None:
            for shape, packed in zip(shapes, self.packed):
                torch.ops.mkldnn._linear_pointwise(inputs[shape], packed, None, "none", [], "")

        return {"F.linear": plain} | ({} if None in self.packed else {"prepacked": prepacked})


def measure_steps(report: Report, path: Path, load_format: str, dtype: str, size: "Size") -> None:
    """Decode steps and a prefill against their floors, then where a decode step's time goes."""
    report.progress(f"{dtype}: loading the model")
    llm = LLM(path, load_format=load_format, dtype=dtype, device="cpu")
    floor = Floor(llm.engine.model_runner.model)
    generator = random.Random(0)

    for n in that_fit(report, llm, size.batch_sizes, size.context_len):
        report.progress(f"{dtype}: decode step, batch {n}")
        with watch_others() as load, decoding(llm, n, size.context_len, generator):
            best = best_of({"engine": llm.step} | floor.sides(n, n), size.step_rounds)
        report.add(against_floor(f"decode step, batch {n}", dtype, best, DECODE_BARS[dtype].get(n)) | load)

    report.progress(f"{dtype}: prefill of {size.prompt_len} tokens")
    with watch_others() as load:
        sides = {"engine": lambda: prefill(llm, size.prompt_len, generator)} | floor.sides(size.prompt_len, 1)
        best = best_of(sides, size.step_rounds)
    report.add(against_floor(f"prefill, {size.prompt_len} tokens", dtype, best, PREFILL_BARS[dtype]) | load)

    del floor
    for n, context_len in size.profiled:
        if not that_fit(report, llm, [n], context_len):
            continue
        name = f"attention in a decode step, batch {n}, context {context_len}"
        report.progress(f"{dtype}: {name}")
        with watch_others() as load, decoding(llm, n, context_len, generator), stopwatch(parts_of(llm)) as seconds:
            best = best_step(llm, seconds, size.step_rounds)
        share = round(100 * best["attention"] / best["step"], 1)
        record = {"measurement": name, "dtype": dtype, "value": share, "unit": "% of the step"}
        report.add(record | {"milliseconds": milliseconds(best)} | load)
    llm.close()


def against_floor(name: str, dtype: str, best: dict[str, float], bar: float | None) -> dict[str, Any]:
    speed = round(best["F.linear"] / best["engine"], 3)
    record = {"measurement": name, "dtype": dtype, "value": speed, "unit": "x the F.linear floor"}
    return record | ({} if bar is None else {"at_least": bar}) | {"milliseconds": milliseconds(best)}


def milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(1000 * value, 3) for name, value in seconds.items()}


# -- Bringing the engine to the step that is measured ------------------------------------------------------------------


@contextmanager
def decoding(llm: LLM, num_seqs: int, context_len: int, generator: random.Random) -> Iterator[None]:
    """In a `with` block, every step decodes one token of each of `num_seqs` sequences.

    They have `context_len` tokens of context in the first step, and one more in each that follows. ValueError if the KV
    cache cannot hold them all: they would never run side by side.
    """
    if not fit(llm, num_seqs, context_len):
        raise ValueError(f"the KV cache holds no {num_seqs} sequences of {context_len} tokens; raise kv_cache_memory")
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    ids = [llm.add_request(random_prompt(llm, context_len - 1, generator), params) for _ in range(num_seqs)]
    scheduler = llm.engine.scheduler
    while scheduler.waiting or any(len(seq.token_ids) == seq.num_prompt_tokens for seq in scheduler.running):
        llm.step()
    yield
    for request_id in ids:
        llm.abort(request_id)


def fit(llm: LLM, num_seqs: int, context_len: int) -> bool:
    """Whether the KV cache holds so many sequences of so many tokens, and some more for the steps to be measured."""
    blocks = llm.engine.block_manager
    return num_seqs * blocks.num_blocks_for(context_len + MORE_TOKENS) <= blocks.num_blocks


def that_fit(report: Report, llm: LLM, batch_sizes: Iterable[int], context_len: int) -> list[int]:
    """The batch sizes that the KV cache has room for; of the others it is told that they are left out."""
    fitting = [n for n in batch_sizes if fit(llm, n, context_len)]
    if left_out := [n for n in batch_sizes if n not in fitting]:
        report.progress(f"left out, for the KV cache is too small: batch {left_out}, {context_len} tokens each")
    return fitting


def prefill(llm: LLM, num_tokens: int, generator: random.Random) -> None:
    """Compute a new prompt, and sample one token."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    llm.add_request(random_prompt(llm, num_tokens, generator), params)
    llm.step()


def random_prompt(llm: LLM, num_tokens: int, generator: random.Random) -> list[int]:
    return generator.choices(range(llm.engine.vocab_size), k=num_tokens)


# -- Where the time goes -----------------------------------------------------------------------------------------------


def parts_of(llm: LLM) -> list[tuple[str, Any, str]]:
    """The parts of a step for `stopwatch`. Attention includes reading and writing the KV cache."""
    engine = llm.engine
    modules = list(engine.model_runner.model.modules())
    kinds = {"matrix products": Linear, "attention": Attention, "norms": RMSNorm}
    layers = [(name, m, "forward") for name, kind in kinds.items() for m in modules if isinstance(m, kind)]
    return layers + [
        ("sampling", engine.model_runner, "choose"),
        ("planning", engine.scheduler, "schedule"),
        ("planning", engine.model_runner.collector, "collect"),
        ("planning", engine.model_runner, "update_tables"),
        ("planning", engine.model_runner, "prepare"),
        ("planning", engine.scheduler, "update"),
    ]


def best_step(llm: LLM, seconds: dict[str, float], rounds: int) -> dict[str, float]:
    """The fastest of several steps: its parts, the whole as "step", and what is in no part as "rest".

    The rest is rotations, activations, residual sums, the embedding, text, and the Python in between.
    """
    best = {"step": math.inf}
    for _ in range(rounds):
        seconds.update(dict.fromkeys(seconds, 0.0))
        start = perf_counter()
        llm.step()
        step = perf_counter() - start
        if step < best["step"]:
            best = seconds | {"rest": step - sum(seconds.values()), "step": step}
    return best
