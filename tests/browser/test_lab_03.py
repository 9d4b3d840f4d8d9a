"""Chapter 03 in a real JupyterLab: the cache map and the explorer; only the cells that they need are run."""

from collections.abc import Iterator

import pytest

from .chromium import sync_api
from .lab import chapter_in_lab, with_ids

CELLS = with_ids("setup", "same-keys", "chain", "record", "cache-map", "hit-rate", "explorer")
ERRORS: list[str] = []  # what JavaScript threw and nobody caught, and what the console shows as an error


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator["sync_api.Page"]:
    with chapter_in_lab(tmp_path_factory.mktemp("lab"), "03_prefix_caching", CELLS, ERRORS) as page:
        yield page


def test_every_cell_runs(page):
    assert page.get_by_text("Traceback (most recent call last)").count() == 0
    assert page.locator(".nanovllm").count() == 2


def test_the_map_shows_who_comes_back(page):
    area = page.locator(".nanovllm").first
    sentence = area.locator(".nanovllm-sentence")
    sync_api.expect(sentence).to_contain_text("it came last, so it is preempted, blocks 3-5 return")
    area.get_by_role("slider").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    sync_api.expect(sentence).to_contain_text("C joins again, finds 48 tokens in the prefix cache")


def test_the_explorer_answers(page):
    area, cells = page.locator(".nanovllm").last, page.locator(".jp-Cell").count()
    sync_api.expect(area).to_contain_text("17% in the small pool, 75% in the large one")
    area.get_by_label("order", exact=True).select_option(label="one after another")
    sync_api.expect(area).to_contain_text("75% in the small pool, 75% in the large one")
    area.get_by_role("slider", name="block size").focus()
    page.keyboard.press("End")
    sync_api.expect(area).to_contain_text("Full blocks in a system prompt: 1.")
    page.keyboard.press("b")
    assert page.locator(".jp-Cell").count() == cells, "no key reaches Lab"
    assert ERRORS == []
