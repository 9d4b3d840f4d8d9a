"""The stepper of chapter 00 in a real JupyterLab, as a reader has it: run its cells, press its buttons, save."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.lessons.saving import WIDGET

from .chromium import sync_api
from .lab import MINUTES, Cells, chapter_in_lab

STEPPER_CELLS = ("llm = LLM(", "greedy = SamplingParams(", "small = LLM(", "stepper = Stepper(", "stepper.run()")


def for_the_stepper(cells: Cells) -> Cells:
    chosen = [cell for cell in cells if any(words in "".join(cell["source"]) for words in STEPPER_CELLS)]
    assert len(chosen) == len(STEPPER_CELLS)
    return chosen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator["sync_api.Page"]:
    with chapter_in_lab(folder, "00_quickstart", for_the_stepper, viewport=(1400, 1000)) as page:
        yield page


def stepper(page: "sync_api.Page") -> "sync_api.Locator":
    return page.locator(".jp-OutputArea-output").filter(has=page.get_by_role("button", name="Step", exact=True)).first


def test_every_cell_runs(page):
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert page.locator(".jp-CodeCell").count() == len(STEPPER_CELLS)


def message(page: "sync_api.Page") -> "sync_api.Locator":
    """What the stepper says of itself; the picture below it says what a step changed."""
    return stepper(page).get_by_role("status").first


def sentence(page: "sync_api.Page") -> "sync_api.Locator":
    return stepper(page).locator(".nanovllm-sentence")


def test_the_stepper_steps(page):
    area = stepper(page)
    area.scroll_into_view_if_needed()
    area.get_by_role("textbox", name="Prompt").fill("The sun rises in the")
    area.get_by_role("button", name="Add a request").click()
    sync_api.expect(message(page)).to_contain_text("waits", timeout=MINUTES)
    sync_api.expect(sentence(page)).to_contain_text("arrives", timeout=MINUTES)
    area.get_by_role("button", name="Step", exact=True).click()
    sync_api.expect(sentence(page)).to_contain_text("computes", timeout=MINUTES)
    sync_api.expect(message(page)).to_contain_text("1 unfinished")
    sync_api.expect(area.get_by_role("table")).to_contain_text("prefill")


def test_the_stepper_by_keyboard(page):
    area = stepper(page)
    before = sentence(page).inner_text()
    cells = page.locator(".jp-Cell").count()
    area.get_by_role("button", name="Step", exact=True).focus()
    page.keyboard.press("Enter")
    sync_api.expect(sentence(page)).not_to_have_text(before, timeout=MINUTES)
    area.get_by_role("textbox", name="Prompt").fill("")
    # In Lab's command mode `a` and `b` insert cells.
    area.get_by_role("textbox", name="Prompt").press_sequentially("a b")
    assert page.locator(".jp-Cell").count() == cells


def test_an_error_is_a_sentence(page):
    area = stepper(page)
    area.get_by_role("textbox", name="Prompt").fill("")
    area.get_by_role("button", name="Add a request").click()
    sync_api.expect(message(page)).to_contain_text("The engine refused: the prompt is empty", timeout=MINUTES)
    area.get_by_role("button", name="Run", exact=True).click()
    sync_api.expect(message(page)).to_contain_text("All requests are finished", timeout=MINUTES)


def test_abort_and_reset(page):
    area = stepper(page)
    area.get_by_role("textbox", name="Prompt").fill("The sun rises in the")
    area.get_by_role("button", name="Add a request").click()
    sync_api.expect(message(page)).to_contain_text("waits", timeout=MINUTES)
    area.get_by_role("button", name="Step ×10").click()
    sync_api.expect(message(page)).to_contain_text("1 unfinished", timeout=MINUTES)
    area.get_by_role("button", name="Abort").click()
    sync_api.expect(message(page)).to_contain_text("is aborted", timeout=MINUTES)
    area.get_by_role("button", name="Reset").click()
    sync_api.expect(message(page)).to_contain_text("All is as new", timeout=MINUTES)
    sync_api.expect(sentence(page)).to_contain_text("Nothing has happened yet", timeout=MINUTES)


def test_a_saved_notebook_keeps_pictures_and_drops_live_entries(page, folder):
    """Saved by a key that is pressed inside the stepper: those with Ctrl are Lab's."""
    path = folder / "notebooks" / "00_quickstart.ipynb"
    before = path.stat().st_mtime_ns
    stepper(page).get_by_role("textbox", name="Prompt").press("Control+s")
    sync_api.expect(page.get_by_text("Saving completed")).to_be_visible(timeout=MINUTES)
    assert path.stat().st_mtime_ns != before
    notebook = json.loads(path.read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert not any(WIDGET in output.get("data", {}) for output in outputs)
    assert any(output.get("metadata", {}).get("image/png", {}).get("widget") == "Stepper" for output in outputs)
    assert "widgets" not in notebook["metadata"]
