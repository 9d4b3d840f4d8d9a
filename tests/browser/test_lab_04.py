"""The timeline of chapter 04 in a real JupyterLab: it plays the run that was recorded, and keeps its keys to itself."""

from collections.abc import Iterator

import pytest

from .chromium import sync_api
from .lab import chapter_in_lab, with_ids

CELLS = with_ids("setup", "static")
ERRORS: list[str] = []  # what JavaScript threw and nobody caught, and what the console shows as an error


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator["sync_api.Page"]:
    with chapter_in_lab(tmp_path_factory.mktemp("lab"), "04_scheduling", CELLS, ERRORS) as page:
        yield page


def test_the_timeline_plays_the_run(page):
    timeline = page.locator(".nanovllm")
    timeline.scroll_into_view_if_needed()
    sentence = timeline.locator(".nanovllm-sentence")
    sync_api.expect(sentence).to_have_text("A generates one token.")
    timeline.locator("input[type=range]").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    sync_api.expect(sentence).to_contain_text("C joins and computes 40 tokens")
    page.keyboard.press("ArrowLeft")
    sync_api.expect(sentence).to_contain_text("A is finished")


def test_keys_stay_in_the_timeline(page):
    page.locator(".nanovllm input[type=range]").focus()
    page.keyboard.press("b")
    assert page.locator(".jp-Cell").count() == 2
    assert ERRORS == []
