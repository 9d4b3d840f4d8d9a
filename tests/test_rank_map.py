"""The rank map without a browser: words, layout, text, PNG, what is sent. The rest: browser/."""

import base64
import json
import zlib

import pytest

from nanovllm.lessons.tiny import tiny_llm
from nanovllm.viz import RankMap
from nanovllm.viz.slices import ALL, ENDS, WIDENED, WIDTH, Choice, Slices, Tensor

from .describing import describe
from .test_widgets import WIDGET

# As in its config.json.
SMOLLM2 = dict(num_layers=30, hidden=576, width=1536, num_heads=9, num_kv_heads=3, head_dim=64, vocab=49_152)


@pytest.fixture(scope="module")
def slices() -> Slices:
    return Slices({"two": describe(2), "four": describe(4), "one": describe(1)})


# -- What is told ------------------------------------------------------------------------------------------------------


def test_a_real_engine_describes_itself_like_that():
    """So what these tests draw is what a notebook draws."""
    llm = tiny_llm(num_kv_blocks=8)
    assert llm.engine.model_runner.describe() == describe(1)
    llm.close()


TEXT = """\
Which rank holds which slice? four, layer 1, rank all

tensor                    shape      rank 0           rank 1            rank 2            rank 3
q_proj                    [64, 64]   rows 0 to 15     rows 16 to 31     rows 32 to 47     rows 48 to 63
k_proj                    [32, 64]   rows 0 to 15     rows 0 to 15      rows 16 to 31     rows 16 to 31
v_proj                    [32, 64]   rows 0 to 15     rows 0 to 15      rows 16 to 31     rows 16 to 31
o_proj                    [64, 64]   columns 0 to 15  columns 16 to 31  columns 32 to 47  columns 48 to 63
gate_proj                 [128, 64]  rows 0 to 31     rows 32 to 63     rows 64 to 95     rows 96 to 127
up_proj                   [128, 64]  rows 0 to 31     rows 32 to 63     rows 64 to 95     rows 96 to 127
down_proj                 [64, 128]  columns 0 to 31  columns 32 to 63  columns 64 to 95  columns 96 to 127
input_layernorm           [64]       all              all               all               all
post_attention_layernorm  [64]       all              all               all               all
KV cache                             2×2×9×16×1×16    2×2×9×16×1×16     2×2×9×16×1×16     2×2×9×16×1×16

7 tensors are split, 2 copied to every rank. A slice of k_proj and v_proj lies on 2 ranks. \
Each of 4 ranks holds 10,368 of 36,992 numbers (28.0%).
digest """


def test_text():
    shown = repr(RankMap({"two": describe(2), "four": describe(4)}, run="four", part="layer 1"))
    assert shown.startswith(TEXT) and len(shown) == len(TEXT) + 12


def test_what_one_rank_holds(slices):
    assert slices.sentence(Choice("four", "layer 0", "2")) == (
        "Rank 2 holds rows 32 to 47 of q_proj; rows 16 to 31 of k_proj and v_proj; columns 32 to 47 of o_proj; rows 64 "
        "to 95 of gate_proj and up_proj; columns 64 to 95 of down_proj; all of input_layernorm and "
        "post_attention_layernorm. In the whole model: 28,992 of 106,816 numbers, and a KV cache of "
        "2 × 2 × 9 × 16 × 1 × 16."
    )


def test_other_sentences(slices):
    assert slices.sentence(Choice("one", "layer 0", ALL)) == "One rank holds all of it: 36,992 numbers."
    assert slices.sentence(Choice("one", ENDS, "3")) == "This run has no rank 3."
    assert slices.sentence(Choice("two", ENDS, ALL)) == (
        "1 tensor is split, 1 copied to every rank. Each of 2 ranks holds 16,448 of 32,832 numbers (50.1%)."
    )
    deeper = Slices({"two": describe(2), "deeper": describe(2, num_layers=3)})
    assert deeper.sentence(Choice("two", "layer 2", ALL)) == "The model of this run has no layer 2."


def test_the_default_model_on_three_ranks():
    slices = Slices({"three": describe(3, **SMOLLM2)})
    assert "Each of 3 ranks holds 1,180,800 of 3,540,096 numbers" in slices.sentence(Choice("three", "layer 29", ALL))
    assert "44,861,760 of 134,515,008 numbers" in slices.sentence(Choice("three", "layer 29", "0"))
    assert slices.parts == [*(f"layer {i}" for i in range(30)), ENDS], "in order, not by the alphabet"


def test_uneven_ranks_are_told_apart():
    uneven = describe(2)
    uneven[1]["tensors"][0]["part"][0] = [256, 500]  # 12 rows fewer
    said = Slices({"uneven": uneven}).sentence(Choice("uneven", ENDS, ALL))
    assert "Each of 2 ranks holds 16,448, 15,680 of 32,832 numbers" in said


# -- How it is drawn ---------------------------------------------------------------------------------------------------


def test_owners():
    whole, top, bottom = ((0, 4), (0, 6)), ((0, 2), (0, 6)), ((2, 4), (0, 6))
    tensor = Tensor("model.layers.0.self_attn.k_proj.weight", (4, 6), (top, top, bottom))
    assert tensor.owners() == {top: (0, 1), bottom: (2,)} and not tensor.is_copied
    assert tensor.short_name == "k_proj" and tensor.words(2) == "rows 2 to 3"
    assert Tensor("norm", (4, 6), (whole, whole)).is_copied


@pytest.mark.parametrize(
    "sizes", [{}, SMOLLM2, dict(hidden=1024, width=3072, num_heads=16, num_kv_heads=8, head_dim=128)]
)
def test_boxes_are_to_scale_and_apart(sizes):
    slices = Slices({"two": describe(1, **sizes)})
    boxes, height = slices.scene(Choice("two", "layer 0", ALL))
    shapes = [tuple(int(n.replace(",", "")) for n in box.shape.split(" × ")) for box in boxes]
    scales = [box.width / shape[-1] for box, shape in zip(boxes, shapes)]
    assert scales == pytest.approx([scales[0]] * len(boxes)) and not any(box.stretched for box in boxes)
    tall = [(box.height / shape[0], scale) for box, shape, scale in zip(boxes, shapes, scales) if len(shape) > 1]
    assert all(a == pytest.approx(b) for a, b in tall if a * 32 > 12)
    for i, box in enumerate(boxes):
        assert box.left >= 0 and box.left + box.width <= WIDTH + 1e-6 and box.top + box.height <= height
        for other in boxes[:i]:
            beside = other.left + other.width <= box.left or box.left + box.width <= other.left
            assert beside or other.top + other.height <= box.top - 20, "there is room for a name"


def test_a_tall_thin_tensor_is_drawn_wider_and_says_so():
    (embedding, _), _ = Slices({"three": describe(3, **SMOLLM2)}).scene(Choice("three", ENDS, ALL))
    assert embedding.stretched and embedding.width == WIDENED
    assert [region.ranks for region in embedding.regions] == [(0,), (1,), (2,)]
    edges = [edge for region in embedding.regions for edge in (region.top, region.bottom)]
    assert edges == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])


def test_three_forms_of_one_picture():
    picture = RankMap({"four": describe(4)}, rank="1")
    data, metadata = picture._repr_mimebundle_()
    assert set(data) == {WIDGET, "image/png", "text/plain"}
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["text/plain"] == repr(picture)
    assert metadata["image/png"]["widget"] == "RankMap"
    assert metadata["image/png"]["alt"].startswith(
        "Which rank holds which slice? four, layer 0, rank 1. Rank 1 holds rows"
    )


def test_the_figure_pales_what_others_hold():
    def pale(**choice):
        (ax,) = RankMap({"four": describe(4)}, **choice).figure().axes
        return sum(patch.get_alpha() is not None for patch in ax.patches)

    assert pale() == 0
    assert pale(rank="1") == 5 * 3 + 2 * 1, "of q, o, gate, up, down three slices; of k and v one"


def digest(runs) -> str:
    return Slices(runs).digest()


def test_the_digest_covers_what_is_not_shown():
    first = digest({"two": describe(2)})
    assert first == digest({"two": describe(2)})
    changed = describe(2)
    changed[1]["tensors"][-2]["part"][1] = [0, 64]  # rank 1 has rank 0's slice of the last layer's down_proj
    assert digest({"two": changed}) != first
    changed = describe(2)
    changed[0]["kv_cache"][4] = 2
    assert digest({"two": changed}) != first


def test_what_is_sent_is_what_is_told(slices):
    runs = {"two": describe(2), "four": describe(4), "one": describe(1)}
    picture = RankMap(runs, run="four")
    data = json.loads(zlib.decompress(picture.get_state()["data"]))
    assert [c["sentence"] for c in data["combinations"]] == [slices.sentence(choice) for choice in slices.choices]
    assert [c["values"] for c in data["controls"]] == [
        ["two", "four", "one"],
        ["layer 0", "layer 1", ENDS],
        [ALL, *"0123"],
    ]
    assert len(data["scenes"]) == 3 * 2, "both layers look the same"
    for choice, combination in zip(slices.choices, data["combinations"]):
        assert data["scenes"][combination["scene"]] == json.loads(json.dumps(slices.scene(choice)))
        assert combination["rank"] == (None if choice.rank == ALL else int(choice.rank))
    assert picture.choice == Choice("four", "layer 0", ALL) and len(data["ranks"]) == 4


@pytest.mark.parametrize(
    ("runs", "choice", "message"),
    [
        ({}, {}, "there are no runs to show"),
        ({"two": []}, {}, "'two' does not describe ranks 0, 1, 2"),
        ({"two": describe(2)[::-1]}, {}, "'two' does not describe ranks 0, 1, 2"),
        ({"two": describe(2)[:1] + describe(2, num_layers=1)[1:]}, {}, "the ranks of 'two' describe different tensors"),
        ({"two": describe(2)}, {"rank": "2"}, r"rank is one of \['all', '0', '1'\], not '2'"),
        ({"two": describe(2)}, {"layer": "0"}, "there is no 'layer'"),
    ],
)
def test_errors(runs, choice, message):
    with pytest.raises(ValueError, match=message):
        RankMap(runs, **choice)
