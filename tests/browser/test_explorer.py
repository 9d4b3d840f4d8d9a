"""The explorer in a browser, on an exported page: choosing by mouse and by keys, what is drawn and said, themes."""

import pytest

from nanovllm.viz import Explorer, Reading

from .chromium import sync_api
from .test_widgets import browser, show  # noqa: F401  # fixtures

EXPLORER = "document.querySelector('.nanovllm').nanovllm"


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    def compute(model, context, sequences):
        weights = {"small": 2.0, "large": 16.0}[model]
        cache = context * sequences * weights / 65536
        bars = {"A": {"weights": weights, "KV cache": cache}, "weights alone": {"weights": weights}}
        return Reading(bars, f"{model}, {context} tokens, {sequences} sequences: {weights + cache:.2f} GB.")

    controls = {"model": ["small", "large"], "context": [1024, 4096, 65536], "sequences": [1, 4, 16]}
    limits = {"T4": 16, "H100": 80}
    start = {"model": "large", "context": 4096}
    return Explorer("How <much>?", controls, compute, "GB", limits, start)


def widths(page: "sync_api.Page") -> list[float]:
    """Where each segment begins and ends, in shares of the axis, as the browser has laid them out."""
    return page.evaluate("""() => [...document.querySelectorAll(".nanovllm-segment")].map((segment) => {
            const [axis, box] = [segment.parentElement, segment].map((element) => element.getBoundingClientRect());
            return [(box.left - axis.left) / axis.width, (box.right - axis.left) / axis.width];
        })""")


def assert_shows(page: "sync_api.Page", explorer: Explorer) -> None:
    """The page shows what `explorer` shows in Python."""
    readings = explorer.readings
    bars = readings.bars(explorer.index)
    sync_api.expect(page.locator("[role=status]")).to_have_text(readings[explorer.index].sentence)
    shares = [share for bar in bars for segment in bar.segments for share in (segment.start, segment.end)]
    assert [share for pair in widths(page) for share in pair] == pytest.approx(shares, abs=0.003)
    assert page.locator(".nanovllm-number").all_inner_texts() == [bar.text for bar in bars]
    assert page.get_by_role("img").get_attribute("aria-label") == explorer.alt()


def test_it_begins_where_python_begins(show, explorer):
    page = show(explorer)
    assert_shows(page, explorer)
    assert page.locator(".nanovllm-title").inner_text() == "How <much>?"
    assert page.locator(".nanovllm-limit").all_inner_texts() == ["H100 80", "T4 16"]
    assert page.get_by_label("model", exact=True).input_value() == "1"
    sync_api.expect(page.get_by_role("slider", name="context")).to_have_attribute("aria-valuetext", "4,096")


def test_every_bar_stands_beside_its_name(show, explorer):
    page = show(explorer)

    def tops(kind):
        boxes = [element.bounding_box() for element in page.locator(kind).all()]
        return [box["y"] + box["height"] / 2 for box in boxes]

    names, bars = tops(".nanovllm-row"), tops(".nanovllm-bar")
    assert names == pytest.approx(bars, abs=2) and bars == sorted(bars) and bars[1] - bars[0] == pytest.approx(34)


def test_every_combination(show, explorer):
    page = show(explorer)
    for choice in explorer.readings.combinations:
        for i, (name, value) in enumerate(choice.items()):
            page.evaluate(f"{EXPLORER}.choose({i}, {explorer.readings.controls[name].index(value)})")
        assert_shows(page, explorer.at(**choice))


def test_choosing_by_mouse(show, explorer):
    page = show(explorer)
    box = page.get_by_role("slider", name="sequences").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 8, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, middle, steps=4)
    assert_shows(page, explorer.at(sequences=4))
    page.mouse.move(box["x"] + box["width"] - 4, middle, steps=4)
    page.mouse.up()
    assert_shows(page, explorer.at(sequences=16))
    page.get_by_label("model", exact=True).select_option(label="small")
    assert_shows(page, explorer.at(sequences=16, model="small"))


def test_choosing_by_keys(show, explorer):
    page = show(explorer)
    page.keyboard.press("Tab")
    page.keyboard.press("s")  # in a menu, a letter chooses
    assert_shows(page, explorer.at(model="small"))
    page.keyboard.press("Tab")
    for key, context in [
        ("ArrowRight", 65536),
        ("ArrowRight", 65536),
        ("ArrowLeft", 4096),
        ("Home", 1024),
        ("End", 65536),
    ]:
        page.keyboard.press(key)
        assert_shows(page, explorer.at(model="small", context=context))


def test_beyond_the_axis(show, explorer):
    page = show(explorer.at(context=65536, sequences=16))
    assert_shows(page, explorer.at(context=65536, sequences=16))
    assert page.locator(".nanovllm-over").count() == 1
    assert page.locator(".nanovllm-number").first.inner_text() == "▸ 272 = 3.4 × H100"


def test_no_key_leaves_but_with_ctrl(show, explorer):
    page = show(explorer)
    page.evaluate("window.left = []; document.addEventListener('keydown', (event) => left.push(event.key))")
    page.get_by_role("slider", name="context").focus()
    for key in ("b", "a", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    assert page.evaluate("left") == []
    page.keyboard.press("Control+s")
    assert page.evaluate("left") == ["Control", "s"], "JupyterLab saves"


@pytest.mark.parametrize("width", [700, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes_and_widths(show, explorer, width, scheme):
    page = show(explorer.at(context=65536, sequences=16), width, scheme)
    background = page.locator(".nanovllm").evaluate("root => getComputedStyle(root).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 27)"}[scheme]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    before = page.locator(".nanovllm-chart").bounding_box()
    page.get_by_label("model", exact=True).select_option(label="small")
    assert page.locator(".nanovllm-chart").bounding_box() == before, "the bars stay where they are"


def test_numbers_stand_in_segments_only_where_there_is_room(show, explorer):
    page = show(explorer)
    cut = page.evaluate("""() => [...document.querySelectorAll(".nanovllm-segment span")].filter((number) => {
            const [outside, inside] = [number.parentElement, number].map((element) => element.getBoundingClientRect());
            const isSeen = inside.top < outside.bottom;
            return isSeen && (inside.left < outside.left - 1 || inside.right > outside.right + 1);
        }).length""")
    assert cut == 0
    seen = page.locator(".nanovllm-segment span").evaluate_all(
        "all => all.filter((one) => one.offsetTop < one.parentElement.clientHeight).map((one) => one.textContent)"
    )
    assert [text for text in seen if text] == ["16"], "1 GB of cache is too narrow for its number"
