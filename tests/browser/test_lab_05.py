"""Chapter 05 in a real JupyterLab: the device is watched, and the explorer chooses buckets without a kernel."""

from collections.abc import Iterator

import pytest

from .chromium import sync_api
from .lab import chapter_in_lab, with_ids

CELLS = with_ids(
    "setup", "device-network", "device-check", "device-watch", "device-counts", "waste", "waste-picture", "explorer"
)
ERRORS: list[str] = []  # what JavaScript threw and nobody caught, and what the console shows as an error


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator["sync_api.Page"]:
    with chapter_in_lab(tmp_path_factory.mktemp("lab"), "05_cuda_graphs", CELLS, ERRORS) as page:
        yield page


def test_the_device_is_watched(page):
    text = page.locator(".jp-OutputArea-output").all_inner_texts()
    assert any("2,048 rows: 40 launches, 40 operators computed" in part for part in text)
    assert page.locator(".jp-OutputArea img").count() == 2  # the lanes, and the padding


def test_the_explorer_chooses_buckets(page):
    explorer = page.locator(".nanovllm")
    explorer.scroll_into_view_if_needed()
    sentence = explorer.locator(".nanovllm-sentence")
    sync_api.expect(sentence).to_contain_text("Graphs: 67. Replayed: 1,023 of 1,032 steps. Padding: 2.3% of the rows.")
    explorer.locator("select").nth(1).select_option("powers of two")
    sync_api.expect(sentence).to_contain_text("Graphs: 10. Replayed: 1,023 of 1,032 steps. Padding: 22.5%")
    explorer.locator("input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    sync_api.expect(sentence).to_contain_text("Graphs: 8. Replayed: 531 of 1,032 steps.")


def test_keys_stay_in_the_explorer(page):
    page.locator(".nanovllm input[type=range]").focus()
    page.keyboard.press("b")
    assert page.locator(".jp-Cell").count() == 8
    assert ERRORS == []
