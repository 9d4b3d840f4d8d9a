"""The engine on a GPU: the benchmark that its family shares, and single steps against what the hardware allows.

A decode step must read all weights, and of each sequence the keys and values of its context. A prefill must do its
multiplications. Bytes over the measured rate of a copy, and operations over the measured rate of a large matrix
product, are the *floors*: no step can be faster than the larger of the two by much. (A copy reads and writes; reading
alone is a little faster, so a step may come out slightly below its floor.)
"""

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.bench.kernels import BLOCK_SIZES, Limits, measure_fused, measure_kernels
from nanovllm.bench.profile import DecodeStep, attention_by_batch, by_kind, kernels_of, where_time_goes
from nanovllm.bench.report import Report, gpu_record
from nanovllm.bench.serving import measure_serving
from nanovllm.bench.steps import decoding, random_prompt, that_fit
from nanovllm.bench.timing import seconds_on_gpu, watch_others
from nanovllm.engine.model_runner import dtype_name, resolve_dtype
from nanovllm.kernels import get_backend
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import LMHead
from nanovllm.layers.linear import Linear
from nanovllm.utils.checkpoint import head_dim_of, load_hf_config
from nanovllm.utils.children import environment_of_a_child

if TYPE_CHECKING:
    from nanovllm.bench import Size

# The sizes of Qwen/Qwen3-0.6B, as its config.json has them: with random weights it takes as long as with trained ones.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151_645,
}

SETTINGS: dict[str, Any] = dict(max_model_len=4096, max_num_batched_tokens=16_384, max_num_seqs=256)


@contextmanager
def qwen3_folder(name: str = "Qwen3-0.6B", sizes: dict[str, Any] = QWEN3) -> Iterator[Path]:
    """A folder with the sizes of a model and no weights, for `load_format="dummy"`."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}-sizes"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(sizes))
        yield path


def shared_workload() -> tuple[list[list[int]], list[int]]:
    """256 prompts and the lengths of their answers: number for number what Nano-vLLM's benchmark draws."""
    random.seed(0)
    prompts = [[random.randint(0, 10_000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    return prompts, [random.randint(100, 1024) for _ in range(256)]


def measure_gpu(report: Report, path: Path, load_format: str, size: "Size") -> None:
    """Kernels, the shared benchmark, steps: of every backend here, with CUDA graphs and without; then a peer."""
    hf_config = load_hf_config(path)
    dtype = resolve_dtype("auto", hf_config, torch.device("cuda"))
    limits = measure_limits(report, dtype)
    model = hf_config.to_dict() | {"head_dim": head_dim_of(hf_config)}
    measure_kernels(report, limits, model)
    measure_fused(report, limits, model)
    common = SETTINGS | {"max_model_len": min(SETTINGS["max_model_len"], hf_config.max_position_embeddings)}
    torch.cuda.empty_cache()  # for the engines of other processes
    measure_start_up(report, path, load_format, dtype, common)
    variants: dict[str, dict[str, Any]] = {
        "": {},
        ", eager": {"enforce_eager": True},
        ", eager, torch attention": {"enforce_eager": True, "attention_backend": "torch"},
    }
    with suppress(ValueError):  # it is not here, or not for this GPU or model
        get_backend("flash_attn", "cuda", dtype, block_size := BLOCK_SIZES["flash_attn"])
        variants[", flash_attn"] = {"attention_backend": "flash_attn", "block_size": block_size}
    for name, settings in variants.items():
        report.progress(f"starting an engine{name}")
        llm = LLM(path, load_format=load_format, **common | settings)
        if llm.engine.model_runner.graphs is not None:
            measure_shared(report, llm, name)
            if not name:
                measure_shared_kernels(report, llm, limits)
        measure_decode_steps(report, llm, size, name, limits)
        measure_prefills(report, llm, size, name, limits)
        if not name:
            measure_queue(report, llm, size, limits)
            measure_first_token(report, llm, size)
        llm.close()
        del llm
    measure_serving(report, path, load_format, dtype_name(dtype), size, device="cuda")


def measure_limits(report: Report, dtype: torch.dtype) -> Limits:
    """The rates of a large copy and a large product, which no step is much above."""
    report.progress("rates of a copy and of a matrix product")
    source = torch.empty(1 << 29, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds_on_gpu(lambda: target.copy_(source))
    del source, target
    square = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    rate = 2 * 8192**3 / seconds_on_gpu(lambda: square @ square)
    report.add(gpu_record("copy, read and written", round(bandwidth / 1e9), "GB/s"))
    report.add(gpu_record("matrix product", round(rate / 1e12), "TFLOP/s", dtype))
    return Limits(bandwidth, rate, dtype)


def measure_start_up(
    report: Report, path: Path, load_format: str, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    """A new engine in a process of its own, where Triton has compiled nothing before, and once more where it has."""
    program = "import sys; from nanovllm.bench.gpu import start_up; start_up(sys.argv[1])"
    given = json.dumps({"model": str(path), "load_format": load_format} | settings)
    with TemporaryDirectory() as empty:
        for cache in ("cold", "warm"):
            report.progress(f"start-up with a {cache} cache, in a process of its own")
            start = perf_counter()
            environment = environment_of_a_child(TRITON_CACHE_DIR=empty)
            output = subprocess.check_output([sys.executable, "-c", program, given], env=environment, text=True)
            details = json.loads(output.splitlines()[-1]) | {"whole_process_s": round(perf_counter() - start, 1)}
            report.add(gpu_record(f"start-up, {cache} cache", details.pop("seconds"), "s", dtype) | details)


def start_up(given: str) -> None:
    """Make an engine with some settings, and print how long that took."""
    start = perf_counter()
    llm = LLM(**json.loads(given))
    graphs = llm.engine.model_runner.graphs
    print(json.dumps({"seconds": perf_counter() - start, "graphs_s": round(graphs.seconds, 1) if graphs else 0}))


def measure_shared(report: Report, llm: LLM, name: str) -> None:
    """The benchmark of the family: output tokens a second, best of three."""
    with watch_others() as load:
        both = shared_both_ways(report, llm, f"shared benchmark{name}", rounds=3)
    for measurement, seconds in both.items():
        report.add(shared_record(measurement, llm, seconds) | load)


def shared_both_ways(report: Report, llm: LLM, name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run of it, in turns: with steps that overlap, and one after the other."""
    overlap = llm.engine.overlap
    seconds: dict[str, list[float]] = {name: [], f"{name}, without overlap": []}
    for i in range(rounds):
        for measurement, runs in seconds.items():
            report.progress(f"{measurement}, run {i + 1} of {rounds}")
            llm.engine.overlap = overlap if measurement == name else None
            runs.append(shared_seconds(llm))
    llm.engine.overlap = overlap
    return seconds


def shared_seconds(llm: LLM) -> float:
    """Seconds of one run of it, with an empty prefix cache."""
    prompts, output_lens = shared_workload()
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in output_lens]
    llm.reset_prefix_cache()
    start = perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return perf_counter() - start


def shared_record(name: str, llm: LLM, seconds: list[float]) -> dict[str, Any]:
    """The best of some runs of it."""
    rate = sum(shared_workload()[1]) / min(seconds)
    return record(name, llm, rate, "output tokens/s") | {"seconds": [round(s, 2) for s in seconds]}


def measure_shared_kernels(report: Report, llm: LLM, limits: Limits) -> None:
    """The kernels of a whole run of the shared benchmark, by kind, and attention in its decodes beside the floor."""
    report.progress("where the shared benchmark's time goes")
    with llm.trace() as trace:
        kernels = kernels_of(lambda: shared_seconds(llm))
    steps: list[DecodeStep | None] = []
    for rows in (step.scheduled for step in trace.steps if step.scheduled_rows):
        num_tokens = sum(row.num_computed_tokens + row.num_new_tokens for row in rows)
        decode = DecodeStep(len(rows), 1000 * num_tokens * token_bytes(llm) / limits.bandwidth)
        steps.append(decode if all(row.num_new_tokens == 1 for row in rows) else None)
    num_layers = sum(isinstance(module, Attention) for module in llm.engine.model_runner.model.modules())
    kinds = {kind: round(ms, 1) for kind, ms in by_kind(kernels).items()}
    about = {"steps": len(steps), "kernels": len(kernels), "by_kind_ms": kinds}
    about |= {"attention": attention_by_batch(kernels, steps, num_layers)}
    report.add(record("kernels of the shared workload", llm, sum(kinds.values()), "ms") | about)


def measure_decode_steps(
    report: Report, llm: LLM, size: "Size", name: str, limits: Limits, context_len: int = 1024
) -> None:
    """Decode steps of several batch sizes, in milliseconds and over their floors."""
    generator = random.Random(0)
    for n in that_fit(report, llm, size.gpu_batch_sizes, context_len):
        report.progress(f"decode step{name}, batch {n}")
        with watch_others() as load, decoding(llm, n, context_len, generator):
            milliseconds = 1000 * step_seconds(llm, size.step_rounds)
            profile = {} if name else where_time_goes(llm.step)
        floor = 1000 * (weight_bytes(llm) + n * context_len * token_bytes(llm)) / limits.bandwidth
        details = {"floor_ms": round(floor, 3), "times_the_floor": round(milliseconds / floor, 2)}
        report.add(record(f"decode step{name}, batch {n}", llm, milliseconds, "ms") | details | profile | load)


def step_seconds(llm: LLM, rounds: int) -> float:
    """Median seconds of a step, one after the other."""
    times = []
    for _ in range(rounds):
        start = perf_counter()
        llm.step()
        times.append(perf_counter() - start)
    return statistics.median(times)


def measure_prefills(report: Report, llm: LLM, size: "Size", name: str, limits: Limits) -> None:
    """Steps of one prompt and of several: operations a second, as a fraction of a large matrix product's."""
    generator = random.Random(1)
    for num_prompts, prompt_len in size.gpu_prefills:
        measurement = f"prefill{name}, {num_prompts} x {prompt_len} tokens"
        report.progress(measurement)
        step = partial(prefill_seconds, llm, num_prompts, prompt_len, generator)
        with watch_others() as load:
            seconds = warm_median(step, size.step_rounds)
            profile = {} if name else where_time_goes(step)
        report.add(prefill_record(measurement, llm, num_prompts, prompt_len, seconds, limits) | profile | load)


def measure_queue(report: Report, llm: LLM, size: "Size", limits: Limits) -> None:
    """Many prompts at once: while the GPU computes some, the next are planned."""
    num_prompts, prompt_len = size.gpu_queue
    measurement = f"prefill of a queue, {num_prompts} x {prompt_len} tokens"
    report.progress(measurement)
    with watch_others() as load:
        call = partial(first_token_seconds, llm, num_prompts, prompt_len, random.Random(3))
        seconds = warm_median(call, size.step_rounds)
    report.add(prefill_record(measurement, llm, num_prompts, prompt_len, seconds, limits) | load)


def prefill_record(
    measurement: str, llm: LLM, num_prompts: int, prompt_len: int, seconds: float, limits: Limits
) -> dict[str, Any]:
    share = 100 * prefill_operations(llm, num_prompts, prompt_len) / seconds / limits.rate
    return record(measurement, llm, share, "% of the product's rate") | {"milliseconds": round(1000 * seconds, 2)}


def prefill_seconds(llm: LLM, num_prompts: int, prompt_len: int, generator: random.Random) -> float:
    """Seconds to compute new prompts step by step, and to sample a token for each."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    for _ in range(num_prompts):
        llm.add_request(random_prompt(llm, prompt_len, generator), params)
    start = perf_counter()
    while llm.has_unfinished_requests():
        llm.step()
    return perf_counter() - start


def measure_first_token(report: Report, llm: LLM, size: "Size", prompt_len: int = 128) -> None:
    """From a prompt to its first token, with nothing else to do, in milliseconds."""
    report.progress("first token")
    with watch_others() as load:
        call = partial(first_token_seconds, llm, 1, prompt_len, random.Random(2))
        milliseconds = 1000 * warm_median(call, size.step_rounds)
    report.add(record(f"first token of {prompt_len}", llm, milliseconds, "ms") | load)


def first_token_seconds(llm: LLM, num_prompts: int, prompt_len: int, generator: random.Random) -> float:
    """Seconds that `generate` takes for a token of each of some new prompts."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    prompts = [random_prompt(llm, prompt_len, generator) for _ in range(num_prompts)]
    start = perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return perf_counter() - start


def warm_median(seconds: Callable[[], float], rounds: int) -> float:
    """The median of what some rounds take, after three to warm up."""
    return statistics.median([seconds() for _ in range(3 + rounds)][3:])


def record(measurement: str, llm: LLM, value: float, unit: str) -> dict[str, Any]:
    return gpu_record(measurement, value, unit, llm.engine.model_runner.dtype)


# -- What a step must do at least --------------------------------------------------------------------------------------


def weight_bytes(llm: LLM) -> int:
    """Bytes of all weights that a step reads: those of the products. Of an embedding it reads a few rows."""
    modules = llm.engine.model_runner.model.modules()
    return sum(module.weight.nbytes for module in modules if isinstance(module, Linear))


def numbers(linear: Linear) -> int:
    """How many numbers a product's matrix has."""
    return (linear.weight if linear.packed is None else linear.packed).numel()


def token_bytes(llm: LLM) -> int:
    """Bytes of keys and values that a token has in the cache."""
    runner = llm.engine.model_runner
    return runner.bytes_per_block // runner.block_size


def prefill_operations(llm: LLM, num_prompts: int, prompt_len: int) -> int:
    """Multiplications and additions to compute some prompts and one row of logits for each; attention is causal."""
    modules = list(llm.engine.model_runner.model.modules())
    head = sum(numbers(module) for module in modules if isinstance(module, LMHead))
    in_layers = sum(numbers(module) for module in modules if isinstance(module, Linear)) - head
    # For each pair of tokens.
    attention = sum(2 * m.num_heads * m.head_dim for m in modules if isinstance(m, Attention))
    num_pairs = prompt_len * (prompt_len + 1) // 2
    return 2 * num_prompts * (prompt_len * in_layers + head + num_pairs * attention)
