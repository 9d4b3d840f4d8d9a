"""Chapter 03 in a real JupyterLab: the cache map and the explorer; only the cells that they need are run."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from .chromium import ARGUMENTS, CHROMIUM, sync_api
from .test_lab import MINUTES, address, folder, run_all  # noqa: F401  # two of them are fixtures

NAME = "03_prefix_caching"
CELLS = {"setup", "same-keys", "chain", "record", "cache-map", "hit-rate", "explorer"}
ERRORS: list[str] = []  # what JavaScript threw and nobody caught, and what the console shows as an error


@pytest.fixture(scope="module")
def page(address: str, folder: Path) -> Iterator["sync_api.Page"]:  # noqa: F811
    path = folder / f"{NAME}.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["id"] in CELLS]
    assert len(notebook["cells"]) == len(CELLS)
    path.write_text(json.dumps(notebook))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.on("pageerror", lambda error: ERRORS.append(str(error)))
        page.on("console", lambda m: ERRORS.append(m.text) if m.type == "error" else None)
        page.goto(address.replace("00_quickstart", NAME))
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=2 * MINUTES)
        run_all(page)
        yield page
        browser.close()


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
