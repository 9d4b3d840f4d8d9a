"""What chapter 05 shares: a step's operators, the tape in the place of graphs, padding, exercise checks, figures."""

import random
import re
from collections import Counter
from itertools import combinations

import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.engine.buckets import BUCKETS, bucket_of, piecewise_buckets_up_to
from nanovllm.lessons import chapter_05
from nanovllm.lessons.chapter_05 import (
    Recorder,
    benchmark_sizes,
    best_buckets,
    capture_graphs,
    draw_operators,
    draw_padding,
    in_the_place_of_cuda_graphs,
    is_view,
    names_from_profiler,
    operators_of_step,
    padding_of,
    tensors_in,
    watch_hidden_states,
)
from nanovllm.lessons.record import stored
from nanovllm.lessons.series import NOTEBOOKS
from nanovllm.lessons.tiny import tiny_llm
from tests.test_notebooks import check_numbers_are_seen, check_told, exercises, recorded_benchmark

CHAPTER = NOTEBOOKS / "05_cuda_graphs.ipynb"
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, seed=0)

# -- Operators ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def llm():
    llm = tiny_llm(num_kv_blocks=16, device="cpu")
    llm.add_request([5, 6, 7], PARAMS)
    llm.step()
    yield llm
    llm.close()


def test_every_layer_calls_the_same_operators(llm):
    operators = operators_of_step(llm)
    first, second = ([o.name for o in operators if o.layer == layer and o.kind != "attention"] for layer in (0, 1))
    assert second == ["aten::add_", *first]  # before the first layer there is nothing to add
    assert {o.kind for o in operators if o.layer == 1} == {*chapter_05.KINDS.values()}
    assert [o.kind for o in operators if o.layer == 1].count("product") == 4
    assert not llm.engine.model_runner.model._forward_hooks  # nothing is left behind
    figure = draw_operators(operators)
    assert len(figure.axes[0].patches) == len(operators)


def test_views_compute_nothing():
    aten = torch.ops.aten
    assert is_view(aten.slice.Tensor) and is_view(aten.view.default) and is_view(aten.t.default)
    assert not is_view(aten.add.Tensor) and not is_view(aten.add_.Tensor) and not is_view(aten.mm.default)


def test_what_the_profiler_sees(llm, capfd):
    names = names_from_profiler(llm.step)
    assert "aten::mul_" in names and capfd.readouterr().err == ""


# -- A tape ------------------------------------------------------------------------------------------------------------


def test_tensors_in():
    x = torch.ones(2)
    assert tensors_in(x) == [x] and tensors_in(3) == [] and len(tensors_in((x, [x, None]))) == 2


def test_a_tape_replays_views_and_work_in_place():
    x = torch.randn(4, 6)

    def function(x):
        left, right = x.chunk(2, dim=-1)
        y = left.sigmoid()
        y += right
        y[0] *= 2
        return torch.cat([y, y.T.contiguous().T], dim=-1), y.max(dim=-1)

    with Recorder() as tape:
        both, best = function(x)
    for _ in range(3):
        x.copy_(torch.randn(4, 6))
        tape.replay()
        expected, expected_best = function(x.clone())
        torch.testing.assert_close(both, expected)
        torch.testing.assert_close(best.values, expected_best.values)
        assert torch.equal(best.indices, expected_best.indices)


@pytest.mark.usefixtures("tapes")
def test_the_engine_captures_and_replays_tapes():
    """One token is as much context as the padding has, so the CPU's attention, which asks for it, is right, too."""
    settings = dict(num_kv_blocks=16, max_num_batched_tokens=8, max_num_seqs=2, device="cpu")
    greedy = SamplingParams(temperature=0, max_tokens=1)
    taped, plain = tiny_llm(**settings), tiny_llm(**settings)
    with in_the_place_of_cuda_graphs(Recorder):
        graphs = capture_graphs(taped)
        with watch_hidden_states(taped) as states:
            answer = taped.generate([[5]], greedy, use_tqdm=False)
    assert sorted(graphs.graphs) == [1, 2, 4, 8] and sorted(graphs.sample_graphs) == [1, 2]
    with watch_hidden_states(plain) as expected:
        assert plain.generate([[5]], greedy, use_tqdm=False)[0]["token_ids"] == answer[0]["token_ids"]
    torch.testing.assert_close(states, expected)
    assert torch.cuda.CUDAGraph is not Recorder  # torch is as it was


# -- Padding -----------------------------------------------------------------------------------------------------------


def test_the_benchmark_is_planned_as_it_was_measured():
    sizes = benchmark_sizes()
    assert len(sizes) == 1032 and sum(bucket_of(n) is not None for n in sizes) == 1023
    prompts, answers = chapter_05.shared_workload()
    assert sum(sizes) == sum(map(len, prompts)) + sum(answers) - len(answers)  # the last token is never computed


def test_a_bar_is_drawn_for_tokens_and_one_for_padding():
    figure = draw_padding({"a": [(3, 4), (4, 4), (600, None)], "b": [(1, 1)]})
    first, second = figure.axes
    heights = [patch.get_height() for patch in first.patches]
    assert heights[:4] == [3, 1, 4, 0] and len(second.patches) == 2
    assert [text.get_text() for text in figure.legends[0].texts] == ["tokens", "padding", "eager"]


def test_best_buckets_against_all_sizes_there_are():
    rng = random.Random(0)
    for _ in range(20):
        sizes, k = [rng.randint(1, 12) for _ in range(8)], rng.randint(1, 3)
        every = [b for n in range(1, k + 1) for b in combinations(range(1, 13), n) if b[-1] >= max(sizes)]
        assert padding_of(sizes, best_buckets(sizes, k)) == min(padding_of(sizes, b) for b in every)
    assert padding_of([1, 3, 9], BUCKETS) == 0 + 1 + 7


# -- Exercises ---------------------------------------------------------------------------------------------------------

CAREFUL = """class Careful:
    def __init__(self, function, example):
        self.function, self.x, self.tape = function, {buffer}, Recorder()
        with self.tape:
            self.y = function(self.x)

    def __call__(self, x):
        {check}
        {fill}
        {replay}
        return {answer}"""
RIGHT = dict(
    buffer="example.clone()",
    check="if x.shape != self.x.shape: raise ValueError(f'{list(x.shape)}, not {list(self.x.shape)}')",
    fill="self.x.copy_(x)",
    replay="self.tape.replay()",
    answer="self.y.clone()",
)

WRONG = [
    (1, "def next_bucket(num_tokens, buckets):\n"
        "    return next(b for b in buckets if b > num_tokens)", "fits exactly"),
    (1, "def next_bucket(num_tokens, buckets):\n"
        "    return min(buckets, key=lambda b: abs(b - num_tokens))", "do not fit into"),
    (1, "def next_bucket(num_tokens, buckets):\n"
        "    return buckets[-1]", "would pad less"),
    (1, "def next_bucket(num_tokens, buckets):\n"
        "    return [b for b in buckets if b >= num_tokens][0]", "return None, do not fail"),
    (1, "def next_bucket(num_tokens, buckets):\n"
        "    return None", "is large enough"),
    (2, "def at_most_one(x):\n"
        "    return x / x.abs().max() if x.abs().max() > 1 else x", "Python still asks for a number"),
    (2, "def at_most_one(x):\n"
        "    return x / max(1.0, x.abs().max().item())", "Python still asks for a number"),
    (2, "def at_most_one(x):\n"
        "    return x / x.abs().max()", "comes out wrong"),
    (2, "def at_most_one(x):\n"
        "    return x.clamp(-1, 1)", "comes out wrong"),
    (2, "def at_most_one(x):\n"
        "    return x.abs().max().clamp(min=1)", "Return a tensor of the shape"),
    (3, CAREFUL.format(**RIGHT | dict(answer="self.y")), "Return a copy"),
    (3, CAREFUL.format(**RIGHT | dict(fill="self.x = x")), "copied into the tape's own tensor"),
    (3, CAREFUL.format(**RIGHT | dict(check="pass")), "PyTorch's own error"),
    (3, CAREFUL.format(**RIGHT | dict(check="assert x.shape == self.x.shape")), "AssertionError"),
    (3, CAREFUL.format(**RIGHT | dict(check="if len(x) != len(self.x): raise ValueError('no')")), "Name both shapes"),
    (3, CAREFUL.format(**RIGHT | dict(check="if x.numel() > self.x.numel():\n"
        "            raise ValueError(f'{list(x.shape)}, not {list(self.x.shape)}')")), "spreads one row over many"),
    (3, CAREFUL.format(**RIGHT | dict(replay="self.y = self.function(self.x)")), "only replay"),
    (4, "def choose_buckets(sizes, num_graphs):\n"
        "    return sorted(set(sizes))", "at most 2 graphs you return 3 buckets"),
    (4, "def choose_buckets(sizes, num_graphs):\n"
        "    from collections import Counter\n"
        "    return [n for n, _ in Counter(sizes).most_common(num_graphs)]", "has none"),
    (4, "def choose_buckets(sizes, num_graphs):\n"
        "    return [max(sizes)]", "There are some that pad"),
    (4, "def choose_buckets(sizes, num_graphs):\n"
        "    step = -(-max(sizes) // num_graphs)\n"
        "    return [step * (i + 1) for i in range(num_graphs)]", "There are some that pad"),
    (4, "def choose_buckets(sizes, num_graphs):\n"
        "    return []", "Return a list of buckets"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "answer", "words"), WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(number, answer, words):
    check_told(CHAPTER, number, answer, words)


def test_the_solution_of_exercise_4_is_fast_enough_for_the_benchmark():
    namespace: dict = {}
    exec(exercises(CHAPTER)[4][0].split("def ")[0] + exercises(CHAPTER)[4][1], namespace)
    sizes = [n for n in benchmark_sizes() if n <= 512]
    chosen = namespace["choose_buckets"](sizes, 10)
    assert len(chosen) <= 10 and chosen[-1] == max(sizes)
    assert padding_of(sizes, chosen) < padding_of(sizes, [2**i for i in range(10)])


# -- Figures in the text -----------------------------------------------------------------------------------------------

DERIVED = {
    "33": "12.04 ms / 361 launches",
    "13": "1 · 12 + 1 rows of padding",
    "27": "tokens of the prompts A and B, chapter 00",
    "67": "len(BUCKETS)",
    "35": "len(buckets_up_to(256))",
    "6130": "703 MB / 114,688 bytes",
    "1073": "37 sizes of 29 pieces",
    "37": "sizes of pieces, tested below",
    "114688": "chapter 00",
    "10": "CUDA's version",
    "5000": "any large number",
    "50": "minutes to read",
    "26": "30 - 4 operators",
    "576": "the default model's width, chapter 01",
    "129": "any number above 128",
    "49152": "the default model's vocabulary, chapter 00",
    "14": "2 · 7 rows",
}


def test_the_numbers_of_the_prose_are_seen():
    besides = re.compile(r"[Cc]hapters?\s\d\d|\b20[12]\d\b|!\[.*?\]|# 05|```.*?```|^\d\. ", flags=re.S | re.M)
    measured = (NOTEBOOKS.parent / "docs" / "performance.md").read_text()
    check_numbers_are_seen(CHAPTER, besides, DERIVED, measured)


def test_derived_numbers():
    bench = recorded_benchmark()
    assert round(12.04 / 361 * 1000) == 33 and len(BUCKETS) == 67 and round(703e6 / 114_688, -1) == 6130
    for n, eager, kernels in ((1, 11.79, 2.89), (8, 18.95, 16.2)):
        assert bench[f"prefill, eager, {n} x 1024 tokens"]["milliseconds"] == eager
        assert bench[f"prefill, {n} x 1024 tokens"]["kernels_ms"] == pytest.approx(kernels, abs=0.05)
    assert bench["prefill, 1 x 1024 tokens"]["milliseconds"] == 3.86
    step = stored("05_decode_step")
    sizes = piecewise_buckets_up_to(16_384, longest=4096)
    assert sizes[:6] == [64, 128, 256, 384, 512, 576] and sizes[-1] == 8192
    assert step["graphs"]["pieces"] == 29 * len(sizes) == 29 * 37 == 1073
    one, many = (step["timelines"][f"eager, batch {n}"] for n in (1, 256))
    kernels = Counter(one["names"][kernel[0]] for kernel in one["kernels"])
    in_every_layer = [name for name, number in kernels.items() if number % 28 == 0]
    assert sum(kernels[name] for name in in_every_layer) // 28 + kernels["rms_norm_kernel"] // 28 == 12
    assert len(one["launches"]) == 12 * 28 + 25 and len(many["launches"]) == 361 - 28 == 333
    assert len(step["timelines"]["graph, batch 256"]["launches"]) == 6 + 3
