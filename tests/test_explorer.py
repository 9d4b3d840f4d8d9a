"""The explorer without a browser: every combination checked, one axis, text, PNG, what is sent. The rest: browser/."""

import base64
import json
import zlib

import numpy as np
import pytest

from nanovllm.viz import Explorer, Reading
from nanovllm.viz.bars import limit_lanes
from nanovllm.viz.readings import number
from nanovllm.viz.theme import colour, hatch, looks

from .test_widgets import WIDGET

CONTROLS = {"model": ["small", "large"], "context": [1024, 4096, 131072]}


def cache(model: str, context: int) -> Reading:
    weights = {"small": 1.2, "large": 16.0}[model]
    kv = weights * context / 16384
    return Reading({"memory": {"weights": weights, "KV cache": kv}}, f"{model} at {context}: {weights + kv:.1f} GB.")


def make(**options) -> Explorer:
    return Explorer(**{"title": "How much?", "controls": CONTROLS, "compute": cache, "unit": "GB"} | options)


def sent(explorer: Explorer) -> dict:
    return json.loads(zlib.decompress(explorer.get_state()["data"]))


TEXT = """\
How much?
model large, context 4,096

memory  |###########################======      :        |  20  (weights 16, KV cache 4)
axis: 0 to 28.8 GB; ':' T4 16 GB, RTX 4090 24 GB
# weights, = KV cache

large at 4096: 20.0 GB.
digest """


def test_text():
    explorer = make(limits={"RTX 4090": 24, "T4": 16}, start={"model": "large", "context": 4096})
    assert repr(explorer).startswith(TEXT) and len(repr(explorer)) == len(TEXT) + 12


def test_letters_are_their_own_marks():
    bars = {"the pool": {"A": 6, "free": 3, "B": 3}}
    explorer = make(compute=lambda model, context: Reading(bars, "Twelve blocks."))
    assert f"|{'A' * 24}{'#' * 12}{'B' * 12}|  12  (A 6, free 3, B 3)" in repr(explorer) and "\n# free\n" in repr(
        explorer
    )


def test_three_forms_of_one_picture():
    explorer = make(start={"context": 4096})
    data, metadata = explorer._repr_mimebundle_()
    assert set(data) == {WIDGET, "image/png", "text/plain"}
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["text/plain"] == repr(explorer)
    assert metadata["image/png"] == {
        "alt": "How much? model small, context 4,096. memory: 1.50 GB (weights 1.20 + KV cache 0.300). "
        "small at 4096: 1.5 GB.",
        "widget": "Explorer",
    }


def test_the_computation_is_asked_once_for_each_combination():
    asked = []

    def compute(**choice):
        asked.append(choice)
        return cache(**choice)

    explorer = make(compute=compute)
    assert asked == [{"model": m, "context": c} for m in CONTROLS["model"] for c in CONTROLS["context"]]
    other = explorer.at(model="large").at(context=131072)
    assert len(asked) == 6, "another start computes nothing"
    assert other.choice == {"model": "large", "context": 131072}
    assert explorer.choice == {"model": "small", "context": 1024}
    assert "large at 131072" in repr(other)


def digest(explorer: Explorer) -> str:
    return repr(explorer).rsplit("digest ", 1)[1]


def test_the_digest_covers_what_is_not_shown():
    first = make()
    assert digest(first) == digest(make()) == digest(first.at(context=4096)), "and not what is chosen"

    def slightly_different(model, context):
        bars, sentence = cache(model, context)
        if (model, context) == ("large", 131072):
            bars["memory"]["KV cache"] += 1
        return Reading(bars, sentence)

    def another_word(model, context):
        bars, sentence = cache(model, context)
        return Reading(bars, sentence.replace("large at 131072", "huge"))

    for other in (
        make(compute=slightly_different),
        make(compute=another_word),
        make(limits={"T4": 16}),
        make(unit="GiB"),
    ):
        assert digest(other) != digest(first)


def test_one_axis_for_all():
    explorer = make()
    assert explorer.readings.end == 16 + 128
    assert [s.end for s in explorer.readings.bars(0)[0].segments] == pytest.approx([1.2 / 144, 1.275 / 144])
    assert [s.end for s in explorer.readings.bars(5)[0].segments] == pytest.approx([16 / 144, 1])
    assert explorer.readings.ticks == [(0, "0"), (50 / 144, "50"), (100 / 144, "100")]


def test_a_bar_beyond_the_largest_limit_says_so():
    explorer = make(limits={"T4": 16, "H100": 80}, start={"model": "large", "context": 131072})
    assert explorer.readings.end == 96, "the axis ends a little behind the largest limit"
    bar = explorer.readings.bars(explorer.index)[0]
    assert bar.text == "▸ 144 = 1.8 × H100" and bar.segments[-1].end == 1
    assert "=>  144 = 1.8 × H100  (weights 16, KV cache 128)" in repr(explorer)
    assert "memory: 144 GB (weights 16 + KV cache 128; 1.8 × H100)." in explorer.alt()
    assert not any(bar.over for i in range(5) for bar in explorer.readings.bars(i))
    alone = make(limits={"H100": 80}, controls={"model": ["small"], "context": [1024]})
    assert 80 < alone.readings.end < 85, "a limit is on the axis, though no bar is as long"


def test_logarithmic():
    def compute(context):
        return Reading({"tokens": {"tokens": context}, "nothing": {"nothing": 0}}, "So many.")

    explorer = make(controls={"context": [20, 100, 1_000_000]}, compute=compute, log=True, limits={"many": 1000})
    ends = [explorer.readings.bars(i)[0].segments[0].end for i in range(3)]
    assert ends == pytest.approx([np.log10(2) / 5, 1 / 5, 1])
    assert explorer.readings.bars(2)[1].segments[0].end == 0
    assert [text for _, text in explorer.readings.ticks] == ["10", "100", "1,000", "10,000", "100,000", "1,000,000"]
    assert "axis: logarithmic, 10 to 1,000,000 GB" in repr(explorer)
    with pytest.raises(ValueError, match="on a logarithmic axis the parts of a bar cannot be compared"):
        make(log=True)


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (7, "7"), (12345.0, "12,345"), (16.06, "16.1"), (0.26944, "0.269"), (1234.5, "1,234"), (0.05, "0.0500")],
)
def test_numbers(value, text):
    assert number(value) == text


def test_names_of_limits_do_not_collide():
    lanes = limit_lanes(make(limits={"RTX 4090": 24, "T4": 16, "RTX 3090": 25, "H100": 80}).readings)
    expected = [("H100 80", 0), ("RTX 3090 25", 0), ("RTX 4090 24", 1), ("T4 16", 2)]
    assert [(words, lane) for _, words, lane in lanes] == expected


def test_colours_of_requests_are_theirs():
    look = looks(["cached", "B", "computed"])
    assert look["B"] == (colour("B"), hatch("B"))
    assert look["cached"][0] != look["computed"][0] and look["cached"][1] != look["computed"][1]
    letters = {colour(name) for name in "ABCDEFGH"}
    assert not letters & {colour for name, (colour, _) in looks([f"thing {i}" for i in range(8)]).items()}


def test_a_legend_only_where_segments_have_names_of_their_own():
    assert sent(make())["legend"]
    assert not sent(make(compute=lambda model, context: Reading({"A": {"A": 1}, "B": {"B": 2}}, "Two.")))["legend"]


def test_what_is_sent_is_what_is_printed():
    explorer = make(limits={"T4": 16, "H100": 80}, start={"model": "large"})
    data, readings = sent(explorer), explorer.readings
    assert [c["sentence"] for c in data["combinations"]] == [readings[i].sentence for i in range(6)]
    for i, combination in enumerate(data["combinations"]):
        assert combination["bars"] == json.loads(json.dumps(readings.bars(i)))
    assert data["controls"][1] == {"name": "context", "values": ["1,024", "4,096", "131,072"], "slides": True}
    assert not data["controls"][0]["slides"] and explorer.get_state()["index"] == 3


def test_numpy_numbers_are_welcome():
    bars = {"x": {"x": np.float32(1.5)}, "y": {"y": np.int64(2)}}
    assert "1.50" in repr(make(compute=lambda model, context: Reading(bars, "Numbers.")))


def returning(bars, sentence="A sentence."):
    return lambda model, context: Reading(bars, sentence)


def other_bars_for_large(model, context):
    return Reading({"memory": {"weights": 1} if model == "small" else {"weights": 1, "KV cache": 2}}, "A sentence.")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"start": {"modell": "small"}}, TypeError, "Explorer: unknown setting 'modell'; did you mean 'model'?"),
        ({"start": {"model": "huge"}}, ValueError, "model is one of 'small', 'large', not 'huge'"),
        ({"controls": {}}, ValueError, "there are no controls"),
        ({"controls": {"context": []}}, TypeError, r"control 'context': give a list of numbers or a list of strings"),
        ({"controls": {"context": [1, "2"]}}, TypeError, r"control 'context': .*, not \[1, '2'\]"),
        ({"controls": {"cached": [True, False]}}, TypeError, "control 'cached': give a list of numbers or"),
        ({"controls": {"context": [1, 1]}}, ValueError, r"control 'context' has a value twice: \[1, 1\]"),
        (
            {"controls": {"a": list(range(100)), "b": list(range(100))}},
            ValueError,
            "10,000 combinations; at most 4,000",
        ),
        ({"compute": lambda model, context: {"x": 1}}, TypeError, "must return a Reading, not dict"),
        ({"compute": returning({})}, ValueError, r"compute\(model='small', context=1024\) has no bars"),
        ({"compute": returning({"a": {"b": 1}}, "")}, ValueError, "the sentence must be a string with something in it"),
        (
            {"compute": returning({"memory": {"weights": -1}})},
            ValueError,
            r"compute\(model='small', context=1024\): 'memory', 'weights' must be at least 0 and finite, not -1",
        ),
        ({"compute": returning({"memory": {"weights": float("nan")}})}, ValueError, "at least 0 and finite, not nan"),
        ({"compute": returning({"memory": {"weights": "1"}})}, TypeError, "'weights' must be a number, not '1'"),
        (
            {"compute": other_bars_for_large},
            ValueError,
            r"compute\(model='large', context=1024\) has .*KV cache.*give 0 for what is not there",
        ),
        ({"limits": {"T4": 0}}, ValueError, "limit 'T4' must be above 0"),
        ({"title": ""}, ValueError, "title must be a string with something in it"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_errors_of_at():
    with pytest.raises(TypeError, match="did you mean 'context'"):
        make().at(contxt=4096)
    with pytest.raises(ValueError, match="context is one of 1024, 4096, 131072, not 5"):
        make().at(context=5)
