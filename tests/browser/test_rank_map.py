"""The rank map in a browser, on an exported page: choosing by mouse and by keys, what is drawn and said."""

import pytest

from nanovllm.viz import RankMap
from nanovllm.viz.slices import ALL, WIDTH

from ..describing import describe
from .chromium import sync_api
from .test_widgets import browser, show  # noqa: F401  # fixtures


@pytest.fixture(scope="module")
def picture() -> RankMap:
    return RankMap({"four ranks": describe(4), "one rank": describe(1)})


def boxes(page: "sync_api.Page", kind: str) -> list[list[float]]:
    """Where each element lies in the picture, in points of Python's layout."""
    return page.evaluate(
        """([kind, width]) => {
            const outer = document.querySelector(".nanovllm-tensors").getBoundingClientRect();
            return [...document.querySelectorAll(kind)].map((element) => {
                const box = element.getBoundingClientRect();
                const place = [box.left - outer.left, box.top - outer.top, box.width, box.height];
                return place.map((n) => n * width / outer.width);
            });
        }""",
        [kind, WIDTH],
    )


def assert_shows(page: "sync_api.Page", picture: RankMap, **choice: str) -> None:
    """The page shows what `picture` has for that choice."""
    slices = picture.slices
    chosen = slices.choices[slices.index(**choice)]
    scene, _ = slices.scene(chosen)
    sync_api.expect(page.locator("[role=status]")).to_have_text(slices.sentence(chosen))
    drawn = boxes(page, ".nanovllm-tensor")
    assert drawn == [pytest.approx([b.left, b.top, b.width, b.height], abs=1.5) for b in scene]
    regions = [(box, region) for box in scene for region in box.regions]
    expected = [
        [
            box.left + region.left * box.width,
            box.top + region.top * box.height,
            (region.right - region.left) * box.width,
            (region.bottom - region.top) * box.height,
        ]
        for box, region in regions
    ]
    assert boxes(page, ".nanovllm-slice") == [pytest.approx(place, abs=1.5) for place in expected]
    is_pale = [chosen.rank != ALL and int(chosen.rank) not in region.ranks for _, region in regions]
    labels = ["" if pale else " ".join(map(str, region.ranks)) for pale, (_, region) in zip(is_pale, regions)]
    assert page.locator(".nanovllm-slice").all_inner_texts() == labels
    assert page.locator(".nanovllm-pale").count() == sum(is_pale)
    assert page.get_by_role("img").get_attribute("aria-label").endswith(slices.sentence(chosen))


def test_it_begins_where_python_begins(show, picture):
    page = show(RankMap({"four ranks": describe(4)}, part="layer 1", rank="2"))
    assert_shows(page, picture, part="layer 1", rank="2")
    names = page.locator(".nanovllm-tensor-name b").all_inner_texts()
    assert names[:4] == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("width", [900, 1300])
def test_every_choice(show, picture, width):
    page = show(picture, width=width)
    for choice in picture.slices.choices:
        for i, (name, value) in enumerate(choice._asdict().items()):
            at = picture.slices.controls[name].index(value)
            page.evaluate(f"document.querySelector('.nanovllm').nanovllm.choose({i}, {at})")
        assert_shows(page, picture, **choice._asdict())


def test_choosing_by_mouse_and_by_keys(show, picture):
    page = show(picture)
    page.get_by_label("rank", exact=True).select_option(label="3")
    assert_shows(page, picture, rank="3")
    page.keyboard.press("Tab")
    page.keyboard.press("o")  # in a menu, a letter chooses
    assert_shows(page, picture, run="one rank", rank="3")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert_shows(page, picture, run="one rank", part="layer 1", rank="3")


def test_copies_are_not_in_a_ranks_colour(show, picture):
    page = show(picture)
    copied = page.locator(".nanovllm-slice.nanovllm-copied")
    assert copied.all_inner_texts() == ["0 1", "2 3", "0 1", "2 3", "0 1 2 3", "0 1 2 3"]
    assert page.locator(".nanovllm-legend").inner_text().split("\n")[-1] == "a copy on each rank named"


def test_a_narrow_page_scrolls(show, picture):
    page = show(picture, width=500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 500
    assert_shows(page, picture)


def test_it_is_readable_on_a_dark_page(show, picture):
    page = show(picture, scheme="dark")
    background = page.locator(".nanovllm").evaluate("element => getComputedStyle(element).backgroundColor")
    assert background == "rgb(22, 24, 27)"
