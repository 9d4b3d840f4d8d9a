"""What chapter 01 shares: its pictures, the tiny decoder, the exercise checks on wrong answers; figures in its text."""

import re

import pytest
import torch

from nanovllm.lessons.chapter_01 import (
    TinyDecoder,
    continued,
    draw_heads,
    draw_sharing,
    draw_steps,
    draw_times,
    record_work,
    windowed,
)
from nanovllm.lessons.series import NOTEBOOKS
from nanovllm.viz.theme import new_figure
from tests.test_notebooks import check_told, read, verdict

CHAPTER = NOTEBOOKS / "01_kv_cache.ipynb"

# -- Pictures ----------------------------------------------------------------------------------------------------------


def test_the_opening_picture_shows_what_the_engine_computes():
    """The figures in its alt text and caption."""
    texts, without, with_cache = record_work()
    assert without == list(range(5, 17)) and sum(without) == 126
    assert with_cache == [5] + [1] * 11 and sum(with_cache) == 16
    assert texts[:6] == ["The", " capital", " of", " France", " is", " Paris"]


def test_a_step_has_a_box_for_each_token():
    ax = new_figure(4, 3).subplots()
    draw_steps(ax, ["a", "b", "c"], computed=[2, 1], context_lens=[2, 3])
    assert [(box.get_x(), box.get_y(), box.get_alpha()) for box in ax.patches] == [
        (0, 0, None),
        (1, 0, None),
        (0, 1, 0.25),
        (1, 1, 0.25),
        (2, 1, None),
    ]


def test_heads_that_share_meet_in_one():
    ax = new_figure(4, 3).subplots()
    draw_sharing(ax, 9, 3)
    assert [line.get_xdata()[1] for line in ax.lines] == [1, 1, 1, 4, 4, 4, 7, 7, 7]
    written = [[text.get_text() for text in ax.texts] for ax in draw_heads().axes]
    assert [texts.count("KV") for texts in written] == [9, 3, 1]
    assert [texts[-1] for texts in written] == ["138,240 bytes a token", "46,080 bytes a token", "15,360 bytes a token"]


def test_times_are_drawn_in_milliseconds():
    left, right = draw_times({16: 0.1, 32: 0.2}, {16: 0.05, 32: 0.06}).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[100, 200], [50, 60]]
    assert [list(line.get_ydata()) for line in right.lines] == [[50, 60]] and right.get_ylim() == (0, 90)


# -- What the text says ------------------------------------------------------------------------------------------------


def cells_run(*ids: str) -> dict:
    """The names that these cells define; none of them needs the model."""
    namespace: dict = {"namedtuple": __import__("collections").namedtuple}
    for cell in read(CHAPTER).cells:
        if cell.id in ids:
            exec(compile(cell.source.split("\nsmall = ")[0], cell.id, "exec"), namespace)
    return namespace


def test_real_models_have_the_parameters_that_their_makers_publish():
    """Counted from the files on Hugging Face; the chapter's formula leaves out the norms."""
    code = {cell.id: cell.source for cell in read(CHAPTER).cells}
    names = cells_run("models")
    exec(code["models"].split("\n")[-4].strip(), names)  # small = Model(…)
    exec(code["models-table"].split("}\n")[0] + "}", names)
    published = {"Qwen3-0.6B": 596_049_920, "Llama-3-8B": 8_030_261_248, "Llama-3-70B": 70_553_706_496}
    published["SmolLM2-135M"] = 134_515_008
    for name, model in names["MODELS"].items():
        missing = published[name] - names["parameters"](model)
        norms = model.hidden * (2 * model.layers + 1) + (2 * model.head_dim * model.layers) * name.startswith("Qwen3")
        assert missing == norms, name


def outputs(id: str) -> str:
    (cell,) = (cell for cell in read(CHAPTER).cells if cell.id == id)
    return "".join(output.get("text", "") for output in cell.outputs)


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line)]


def test_the_text_is_true_of_the_times_that_were_saved():
    """The text quotes none of them; what it says of them holds on any machine."""
    (at_1024,) = (line for line in outputs("time").splitlines() if line.startswith("context 1024"))
    _, without, with_cache = numbers(at_1024)
    assert 1 < without / with_cache < 854 / 2  # "far less than 854 times faster"
    one, _, _, at_64, at_256 = map(numbers, outputs("rows").splitlines())
    assert at_64[1] / one[1] < 50 / 2  # "Does it take 50 times as long? No, far from it"
    assert one[3] > at_256[3] and one[4] < at_256[4]  # "the GB a second fall, and the multiplications a second rise"


# -- What the checks compare with --------------------------------------------------------------------------------------


def test_the_tiny_decoder_is_the_same_with_a_cache_in_any_pieces():
    model, token_ids = TinyDecoder(3), list(range(12))
    whole, cache = model.forward(token_ids, {}), {}
    pieces = [model.forward(token_ids[start:end], cache) for start, end in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(torch.cat(pieces), whole)
    assert len(cache[0][0]) == 12


def test_its_texts_do_not_repeat_one_token():
    """Else a wrong guess could be right by chance."""
    assert all(len(set(continued(TinyDecoder(seed), [1, 2, 3, 4, 5, 6], 24))) > 5 for seed in range(20))


def test_a_window_hides_what_is_outside():
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = torch.randn(3, 6, 2, 8, generator=generator)
    inside = windowed(queries, keys, values, 5, 2)
    keys[[0, 1, 2, 5]], values[[0, 1, 2, 5]] = 9.0, 9.0
    assert torch.equal(windowed(queries, keys, values, 5, 2), inside)
    keys[3] = 9.0
    assert not torch.equal(windowed(queries, keys, values, 5, 2), inside)


# -- Exercises ---------------------------------------------------------------------------------------------------------

RATE = "def tokens_per_second(bandwidth, weights, per_token, context, batch):\n    return "
SLIDE = """import torch
def slide(key, value, new_key, new_value, window):
    keys, values = torch.cat([key, new_key]), torch.cat([value, new_value])
    return """
PACK = """def pack(x):
    scale = {scale}
    return {numbers}, scale
def unpack(numbers, scale):
    return numbers * scale"""
SCALE = "x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-8) / 127"
NUMBERS = "(x / scale).round().to(torch.int8)"
VERIFY = """def verify(forward, cache, last_token, guesses):
    start = len(cache[0][0])
    chosen = forward([last_token, *guesses], cache).argmax(dim=-1).tolist()
    right = 0
    while right < len(guesses) and guesses[right] == chosen[right]:
        right += 1
    for i, (key, value) in cache.items():
        cache[i] = key[:{end}], value[:{end}]
    return {returned}"""
ONE_BY_ONE = """def verify(forward, cache, last_token, guesses):
    made = []
    for guess in [*guesses, None]:
        last_token = int(forward([last_token], cache)[-1].argmax())
        made.append(last_token)
        if last_token != guess:
            return made"""

WRONG = [
    (1, RATE + "bandwidth / (weights + batch * context * per_token)", "That is the number of steps"),
    (1, RATE + "batch * bandwidth / weights", "also the keys and values"),
    (1, RATE + "bandwidth / (weights + context * per_token)", "read once a step"),
    (1, RATE + "0.0", "the limit is 221.207 tokens a second"),
    (2, SLIDE + "keys, values", "The window is 4, the new token included"),
    (2, SLIDE + "keys[-window - 1:], values[-window - 1:]", "keep 5 tokens"),
    (2, SLIDE + "keys[:window], values[:window]", "not attention over the last"),
    (2, SLIDE + "keys[-window:], values", "keys, but"),
    (2, SLIDE + "keys[-window + 1:], values[-window + 1:]", "itself included"),
    (2, SLIDE + "keys", "Return two tensors"),
    (3, PACK.format(scale=SCALE, numbers="x / scale"), "make them"),
    (3, PACK.format(scale=SCALE, numbers="(x / scale).to(torch.int8)"), "round the others"),
    (3, PACK.format(scale="x.abs().amax() / 127", numbers=NUMBERS), "a scale of its own"),
    (3, PACK.format(scale="x.abs().amax(dim=(0, 2), keepdim=True).clamp(min=1e-8) / 127", numbers=NUMBERS),
        "a scale of its own"),
    (3, PACK.format(scale="x.abs().amax(dim=-1, keepdim=True) / 127", numbers=NUMBERS), "0 / 0 is NaN"),
    (3, PACK.format(scale="x.abs().clamp(min=1e-8) / 127", numbers=NUMBERS), "one for each is enough"),
    (4, VERIFY.format(end="start + 1 + len(guesses)", returned="chosen[: right + 1]"), "roll the rejected"),
    (4, VERIFY.format(end="start + right", returned="chosen[: right + 1]"), "were right"),
    (4, VERIFY.format(end="start + 1 + right", returned="chosen[:right]"), "one more token"),
    (4, VERIFY.format(end="start + 1 + right", returned="chosen"), "is certain, and you return"),
    (4, ONE_BY_ONE, "All guesses go into one step"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "answer", "words"), WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(number, answer, words):
    check_told(CHAPTER, number, answer, words)


@pytest.mark.parametrize(
    ("scale", "numbers"),
    [
        ("torch.where(largest == 0, 1.0, largest / 127)", "(x / scale).round().to(torch.int8)"),
        ("largest / 127", "(x / scale).nan_to_num().round().to(torch.int8)"),
        ("largest / 127", "(x / scale.clamp(min=1e-8)).round().char()"),
    ],
)
def test_every_way_around_a_head_of_zeros_is_right(scale, numbers):
    largest = "import torch\n" + PACK.replace(
        "    scale", "    largest = x.abs().amax(dim=-1, keepdim=True)\n    scale"
    )
    assert verdict(CHAPTER, 3, largest.format(scale=scale, numbers=numbers)).right
