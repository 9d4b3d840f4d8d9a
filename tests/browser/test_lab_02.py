"""Chapter 02 in a real JupyterLab: all cells run, and the cache map plays the run that was recorded."""

from collections.abc import Iterator

import pytest

from .chromium import sync_api
from .lab import chapter_in_lab

ERRORS: list[str] = []  # what JavaScript threw and nobody caught, and what the console shows as an error


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator["sync_api.Page"]:
    with chapter_in_lab(
        tmp_path_factory.mktemp("lab"), "02_paged_attention", errors=ERRORS, viewport=(1400, 1000)
    ) as page:
        yield page


def cache_map(page: "sync_api.Page") -> "sync_api.Locator":
    return page.locator(".jp-OutputArea-output").filter(has=page.locator(".nanovllm-sentence")).first


def test_every_cell_runs(page):
    assert page.locator(".jp-CodeCell").count() >= 20
    assert page.get_by_text("Traceback (most recent call last)").count() == 0
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0


def test_the_cache_map_plays_the_run(page):
    area = cache_map(page)
    area.scroll_into_view_if_needed()
    sentence = area.locator(".nanovllm-sentence")
    sync_api.expect(sentence).to_contain_text("C is preempted, blocks 4-6 return")
    area.get_by_role("button", name="Previous step").click()
    sync_api.expect(sentence).to_have_text("A, B and C generate one token each.")
    slider = area.locator("input[type=range]")
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, middle, steps=10)
    page.mouse.up()
    sync_api.expect(sentence).to_contain_text("C is finished, blocks 0 and 2-4 return")


def test_keys_stay_in_the_map(page):
    area, cells = cache_map(page), page.locator(".jp-Cell").count()
    area.locator("input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    sync_api.expect(area.locator(".nanovllm-sentence")).to_have_text("C generates one token.")
    page.keyboard.press("b")
    assert page.locator(".jp-Cell").count() == cells
    assert ERRORS == []
