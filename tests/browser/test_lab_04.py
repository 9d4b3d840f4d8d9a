"""The timeline of chapter 04 in a real JupyterLab: it plays the run that was recorded, and keeps its keys to itself."""

import json
from collections.abc import Iterator

import pytest

from .chromium import ARGUMENTS, CHROMIUM, sync_api
from .test_lab import MINUTES, address, folder, run_all  # noqa: F401  # two of them are fixtures

CELLS = ["setup", "static"]
ERRORS: list[str] = []  # what JavaScript threw and nobody caught, and what the console shows as an error


@pytest.fixture(scope="module")
def page(address: str, folder) -> Iterator["sync_api.Page"]:  # noqa: F811
    path = folder / "04_scheduling.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["id"] in CELLS]
    assert len(notebook["cells"]) == len(CELLS)
    path.write_text(json.dumps(notebook))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.on("pageerror", lambda error: ERRORS.append(str(error)))
        page.on("console", lambda m: ERRORS.append(f"{m.text} ({m.location['url']})") if m.type == "error" else None)
        page.goto(address.replace("00_quickstart", "04_scheduling"))
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=2 * MINUTES)
        run_all(page)
        yield page
        browser.close()


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
    assert page.locator(".jp-Cell").count() == len(CELLS)
    assert ERRORS == []
