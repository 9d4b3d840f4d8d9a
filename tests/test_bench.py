"""The benchmarks measure what they say they do. A tiny model and very little of everything; no figure is judged."""

import importlib.util
import json
import random
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from nanovllm import LLM
from nanovllm.bench import Size, gpu, ranks, run, steps
from nanovllm.bench.profile import DecodeStep, Kernel, attention_by_batch, by_kind, kind_of
from nanovllm.bench.report import Report
from nanovllm.bench.serving import Workload
from nanovllm.bench.timing import best_of, stopwatch, watch_others
from nanovllm.layers.linear import Linear
from nanovllm.lessons.record import stored

SMALL = Size(
    dtypes=("float32",),
    batch_sizes=(1, 4),
    context_len=32,
    prompt_len=40,
    profiled=((2, 32),),
    step_rounds=3,
    num_requests=7,
    prompt_lens=(4, 24),
    output_lens=(2, 12),
    num_sharing=5,
    prefix_len=64,
    static_batch_size=3,
    serving_rounds=2,
    num_kv_blocks=64,
    num_planned=16,
    planning_steps=5,
    num_traced=8,
    trace_pairs=3,
)


needs_generate_batch = pytest.mark.skipif(
    not hasattr(transformers, "ContinuousBatchingConfig"),
    reason="this transformers has no `generate_batch` to compare with",
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("bench") / "results.jsonl"


@pytest.fixture(scope="module")
def report(model_path, out) -> Report:
    return run(model_path, out=out, size=SMALL)


@needs_generate_batch
def test_every_part_is_measured(report):
    assert [record["measurement"] for record in report.records] == [
        "environment",
        "recording a trace, 8 sequences (median of 3 pairs)",
        "planning a step, 16 sequences (median)",
        "decode step, batch 1",
        "decode step, batch 4",
        "prefill, 40 tokens",
        "attention in a decode step, batch 2, context 32",
        "7 requests, against generate",
        "7 requests, against generate_batch",
        "5 requests that share 64 tokens, against generate",
        "peak memory beyond imports, model and KV cache",
    ]


def test_the_lines_in_the_file_are_the_records(report, out):
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == report.records


def test_figures_are_positive(report):
    for record in report.records[1:]:
        # A difference of two measurements may come out negative: memory, and the cost of a trace.
        is_difference = record["unit"] == "MB" or "trace" in record["measurement"]
        figures = [] if is_difference else [record["value"]]
        for name in ("milliseconds", "tokens_per_second"):
            figures += record.get(name, {}).values()
        assert all(figure > 0 for figure in figures), record


def test_the_environment_is_told(report):
    environment = report.records[0]
    assert environment["threads"] == torch.get_num_threads()
    assert all(environment[name] for name in ("cpu", "cores", "torch", "transformers", "date", "model"))


@needs_generate_batch
def test_every_side_gives_the_same_tokens(report):
    """Greedy, in float32. If one side did less work than another, their speeds would say nothing."""
    same = {record["measurement"]: record["same_answers"] for record in report.records if "same_answers" in record}
    assert list(same.values()) == [7, 7, 5]


@needs_generate_batch
def test_both_configurations_are_told(report):
    settings = next(r["settings"] for r in report.records if "generate_batch" in r["measurement"])
    ours, theirs = settings["nanovllm"], settings["generate_batch"]
    assert ours["num_kv_blocks"] == theirs["num_blocks"] == 64
    assert ours["block_size"] == theirs["page_size"] == 16
    assert ours["max_num_batched_tokens"] == theirs["max_batch_tokens"]


def test_the_parts_of_a_step_make_up_the_step(report):
    parts = dict(next(r["milliseconds"] for r in report.records if r["measurement"].startswith("attention")))
    step = parts.pop("step")
    assert sum(parts.values()) == pytest.approx(step, abs=0.01)


def test_memory_adds_up(report):
    record = report.records[-1]
    sizes = record["megabytes"]
    assert record["value"] == sizes["peak"] - sizes["imports"] - sizes["model"] - sizes["kv_cache"]
    assert sizes["peak"] > sizes["imports"] + sizes["kv_cache"]  # the cache was really used


@pytest.mark.parametrize("fixture", ["tiny_qwen3_path", "tiny_llama_path"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_floor_multiplies_every_weight_once(fixture, dtype, request, monkeypatch):
    path = request.getfixturevalue(fixture)
    floor = steps.Floor(LLM(path, dtype=dtype, num_kv_blocks=8).engine.model_runner.model)
    calls = []
    monkeypatch.setattr(steps.F, "linear", lambda x, weight: calls.append((len(x), weight)))
    floor.sides(num_tokens=7, num_sampled=2)["F.linear"]()

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    theirs = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(weight.numel() for _, weight in calls) == sum(weight.numel() for weight in theirs)
    total = sum(weight.double().sum().item() for _, weight in calls)
    expected = sum(weight.to(getattr(torch, dtype)).double().sum().item() for weight in theirs)
    assert total == pytest.approx(expected, rel=1e-6)  # the very same weights
    assert [rows for rows, _ in calls] == [7] * (len(calls) - 1) + [2]  # the head has sampled rows alone
    assert len(calls) == 2 * 4 + 1  # merged as in the model


def test_the_floor_computes_what_the_model_does(model_path):
    """Plain and prepacked products of the same inputs agree, so both are products with the same weights."""
    model = LLM(model_path, num_kv_blocks=8).engine.model_runner.model
    floor = steps.Floor(model)
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    for linear, weight in zip(linears, floor.weights, strict=True):
        x = torch.randn(3, weight.size(1))
        torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("num_seqs, context_len", [(1, 10), (5, 33)])
def test_a_measured_step_is_a_decode_of_all_sequences(model_path, num_seqs, context_len):

    llm = LLM(model_path, num_kv_blocks=64)
    batches = []
    with steps.decoding(llm, num_seqs, context_len, random.Random(0)):
        for _ in range(2):
            batches.append(llm.engine.step()[0])
    for i, batch in enumerate(batches):
        assert [s.num_new_tokens for s in batch.scheduled] == [1] * num_seqs
        assert [s.num_computed_tokens + 1 for s in batch.scheduled] == [context_len + i] * num_seqs
    assert not llm.has_unfinished_requests()


def test_a_prefill_finds_nothing_in_the_cache(model_path):

    llm = LLM(model_path, num_kv_blocks=64)
    generator = random.Random(0)
    computed = []
    schedule = llm.engine.scheduler.schedule
    llm.engine.scheduler.schedule = lambda: computed.append(schedule()) or computed[-1]
    for _ in range(3):
        steps.prefill(llm, 40, generator)
    assert [batch.num_tokens for batch in computed] == [40, 40, 40]


def test_the_workload_is_the_same_every_time():
    work = Workload.make(SMALL.num_sharing, SMALL.prefix_len, 1000, SMALL)
    assert work == Workload.make(SMALL.num_sharing, SMALL.prefix_len, 1000, SMALL)
    assert all(prompt[:64] == work.prompts[0][:64] for prompt in work.prompts)
    assert all(4 <= len(prompt) - 64 <= 24 for prompt in work.prompts)
    assert all(2 <= n <= 12 for n in work.output_lens)
    assert len({tuple(prompt[64:68]) for prompt in work.prompts}) == len(work.prompts)


def test_sides_take_turns():
    calls = []
    best_of({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4  # one to warm up


def test_what_does_not_fit_into_the_cache_is_left_out(model_path, capsys):
    """A batch too large would be preempted for ever, and never decode side by side."""
    llm = LLM(model_path, dtype="float32", device="cpu", num_kv_blocks=20)
    assert steps.that_fit(Report(), llm, (1, 2, 8), 64) == [1, 2]  # eight blocks each, with what is to come
    assert "left out, for the KV cache is too small: batch [8], 64 tokens each" in "".join(capsys.readouterr())
    with steps.decoding(llm, 2, 64, random.Random(0)):
        assert len(llm.engine.scheduler.running) == 2
    with pytest.raises(ValueError, match="the KV cache holds no 8 sequences of 64 tokens"):
        with steps.decoding(llm, 8, 64, random.Random(0)):
            pass


def test_no_part_of_a_step_is_counted_twice(model_path, monkeypatch):
    llm = LLM(model_path, device="cpu", num_kv_blocks=32)
    running = []

    def alone(name, function):
        def call(*args):
            assert not running, f"{name} is called in {running[0]}, and its time would be in both"
            running.append(name)
            try:
                return function(*args)
            finally:
                running.pop()

        return call

    for name, owner, method in steps.parts_of(llm):
        monkeypatch.setattr(owner, method, alone(name, getattr(owner, method)), raising=False)
    with steps.decoding(llm, 3, 20, random.Random(0)):
        llm.step()


def test_the_stopwatch_leaves_objects_as_they_were(model_path):
    llm = LLM(model_path, num_kv_blocks=8)
    before = dict(vars(llm.engine.scheduler))
    with pytest.raises(KeyboardInterrupt), stopwatch(steps.parts_of(llm)) as seconds:
        llm.generate([[1, 2, 3]], use_tqdm=False)
        raise KeyboardInterrupt
    assert all(value > 0 for value in seconds.values())
    assert vars(llm.engine.scheduler) == before
    assert not any("forward" in vars(module) for module in llm.engine.model_runner.model.modules())


def test_a_busy_machine_is_noticed():
    program = "import time\nwhile True: pass"
    busy = subprocess.Popen([sys.executable, "-c", program])
    try:
        with watch_others() as load:
            time.sleep(1.0)
    finally:
        busy.kill()
        busy.wait()
    assert load["others_cores"] > 0.3 and 0.1 < load["python_ms"] < 1000


@pytest.mark.parametrize("others_cores, is_said", [(0.02, False), (0.8, True)])
def test_a_busy_machine_is_said(others_cores, is_said):
    report = Report()
    report.add({"measurement": "environment"})
    report.add({"measurement": "m", "dtype": "float32", "value": 1.0, "unit": "ms", "others_cores": others_cores})
    assert any("0.8 of its cores busy" in line for line in report.table()) is is_said


@pytest.mark.parametrize(
    "bar, row",
    [
        ({"at_least": 1.0}, "| m | float32 | 0.98 x | ≥ 1 | no |"),
        ({"at_least": 0.9}, "| m | float32 | 0.98 x | ≥ 0.9 | yes |"),
        ({"at_most": 2.0}, "| m | float32 | 0.98 x | ≤ 2 | yes |"),
        ({}, "| m | float32 | 0.98 x |  |  |"),
    ],
)
def test_the_table_says_what_is_reached(bar, row):
    report = Report()
    report.add({"measurement": "environment"})
    report.add({"measurement": "m", "dtype": "float32", "value": 0.98, "unit": "x", **bar})
    assert list(report.table())[2] == row


# -- On a GPU ----------------------------------------------------------------------------------------------------------


def test_the_shared_workload_is_that_of_the_family():
    """133,966 tokens, as Nano-vLLM's benchmark prints; the prompts' sum and ends as its few lines draw them."""
    prompts, output_lens = gpu.shared_workload()
    assert len(prompts) == len(output_lens) == 256 and sum(output_lens) == 133_966
    random.seed(0)
    lens = [len([random.randint(0, 10000) for _ in range(random.randint(100, 1024))]) for _ in range(256)]
    assert [len(prompt) for prompt in prompts] == lens
    assert output_lens[-1] == [random.randint(100, 1024) for _ in range(256)][-1]


def test_floors_count_what_a_step_must_do(tmp_path):
    """By hand for two layers: bytes of the products, bytes of a token's keys and values, operations of a prefill."""
    sizes = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    (tmp_path / "config.json").write_text(
        json.dumps(gpu.QWEN3 | sizes | dict(num_key_value_heads=2, head_dim=16, eos_token_id=1))
    )
    llm = LLM(tmp_path, load_format="dummy", dtype="float32", device="cpu", num_kv_blocks=200)
    layer = 32 * (64 + 32 + 32) + 64 * 32 + 3 * 32 * 48
    assert gpu.token_bytes(llm) == 2 * 2 * 2 * 16 * 4
    scores_and_mixing = 2 * 2 * 4 * 16 * (10 * 11 // 2)
    assert gpu.prefill_operations(llm, 3, 10) == 2 * 3 * (10 * 2 * layer + 100 * 32 + scores_and_mixing)
    llm.close()


@pytest.mark.parametrize("n", [1, 256])
def test_what_the_kernels_of_a_step_are_for(n):
    """The kernels of a real step: 28 layers with four products and the head, attention in two kernels, two norms."""
    run = stored("05_decode_step")["timelines"][f"graph, batch {n}"]
    kinds = Counter(kind_of(run["names"][kernel[0]]) for kernel in run["kernels"])
    assert kinds["attention"] == 2 * 28 and kinds["sums and norms"] == 2 * 28 + 1 and kinds["sampler"] == 2
    assert kinds["QK norms and rotation"] == kinds["activation"] == kinds["storing keys and values"] == 28
    assert kinds["products"] == 4 * 28 + 1 + (28 if n == 1 else 0)  # cuBLAS adds up the halves of one that it has split


def test_attention_is_told_for_few_sequences_and_for_many():
    """Two layers; a step with prompts, one of 3 decodes, one of 20, one of 16, by hand."""
    step = [Kernel("nvjet_tst", 9.0), Kernel("attend_kernel", 1.0), Kernel("attend_kernel", 2.0)]
    split = [Kernel("attend_kernel", 3.0), Kernel("combine_kernel", 0.5)] * 2 + [Kernel("nvjet_tst", 9.0)]
    steps = [None, DecodeStep(3, 2.0), DecodeStep(20, 6.0), DecodeStep(16, 1.5)]
    kernels = step + step + split + step
    assert by_kind(kernels) == {"products": 36.0, "attention": 16.0}
    assert attention_by_batch(kernels, steps, 2) == [
        dict(sequences=[1, 16], steps=2, ms=6.0, floor_ms=3.5, times_the_floor=1.714),
        dict(sequences=[17, 32], steps=1, ms=7.0, floor_ms=6.0, times_the_floor=1.167),
    ]
    with pytest.raises(AssertionError, match="8 layers attend in 3 steps"):
        attention_by_batch(kernels, steps[1:], 2)


def test_one_rank_and_two(monkeypatch):
    """What several GPUs would measure, with ranks on a CPU."""
    sizes = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    tiny = gpu.QWEN3 | sizes | dict(num_key_value_heads=2, head_dim=16, eos_token_id=1)
    settings = dict(device="cpu", max_model_len=256, num_kv_blocks=64, max_num_batched_tokens=128, max_num_seqs=8)
    changes = dict(MODELS={"tiny": tiny}, SETTINGS=settings, BATCH_SIZES=(1, 3), CONTEXT_LEN=20, PREFILL=(2, 20))
    changes |= dict(ROUNDS=4, SHARED_ROUNDS=1)
    for name, value in changes.items():
        monkeypatch.setattr(ranks, name, value)
    monkeypatch.setattr(gpu, "shared_workload", lambda: ([[1, 2, 3]] * 4, [5] * 4))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")

    report = Report()
    ranks.measure_ranks(report)
    assert report.records == [], "there is one GPU at most"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    ranks.measure_ranks(report)
    parts = ["decode step, batch 1", "decode step, batch 3", "prefill, 2 x 20 tokens", "shared benchmark"]
    parts.append("shared benchmark, without overlap")
    expected = [f"tiny on {n}: {part}" for n in ("1 GPU", "2 GPUs") for part in parts]
    assert [record["measurement"] for record in report.records] == expected
    assert all(record["value"] > 0 for record in report.records)

    def llm(path, tensor_parallel_size, **settings):
        if tensor_parallel_size == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return LLM(path, tensor_parallel_size=tensor_parallel_size, **settings)

    monkeypatch.setattr(ranks, "LLM", llm)
    report = Report()
    ranks.measure_ranks(report)
    assert [record["measurement"] for record in report.records] == expected[5:], "two hold what one cannot"


@pytest.mark.gpu
def test_every_part_is_measured_on_a_gpu(model_path, monkeypatch):
    monkeypatch.setattr(gpu, "shared_workload", lambda: ([[1, 2, 3]] * 4, [5] * 4))  # the tiny model knows few words
    report = Report()
    size = Size(gpu_batch_sizes=(1, 3), step_rounds=3, gpu_prefills=((1, 64), (2, 64)), gpu_queue=(3, 64))
    gpu.measure_gpu(report, model_path, "auto", size)
    assert all(record["value"] > 0 for record in report.records)
    measured = [record["measurement"] for record in report.records]
    has_flash = importlib.util.find_spec("flash_attn") is not None and torch.cuda.get_device_capability() >= (8, 0)
    num_engines = 4 if has_flash else 3
    start_ups = [record for record in report.records if record["measurement"].startswith("start-up")]
    assert [record["whole_process_s"] > record["value"] > record["graphs_s"] > 0 for record in start_ups] == [True] * 2
    assert sum("decode step" in name for name in measured) == 2 * num_engines
    assert sum("prefill" in name and "tokens" in name for name in measured) == 2 * num_engines + 1
    assert sum("shared benchmark" in name for name in measured) == 2 * (num_engines - 2)  # not of those without graphs
    (profile,) = (record for record in report.records if record["measurement"] == "kernels of the shared workload")
    assert profile["by_kind_ms"].keys() >= {"attention", "products", "sums and norms", "sampler"}
    assert [row["steps"] for row in profile["attention"]] == [profile["steps"] - 1], "all but the prompts'"
