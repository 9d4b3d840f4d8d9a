"""The stepper of chapter 00 in a real JupyterLab, as a reader has it: run its cells, press its buttons, save."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.lessons.saving import WIDGET
from nanovllm.lessons.series import NOTEBOOKS

from .chromium import ARGUMENTS, CHROMIUM, sync_api

SERVE = "import nanovllm.__main__ as m, pathlib; m.NOTEBOOKS = pathlib.Path({folder!r}); m.main({arguments})"
MINUTES = 60_000  # Playwright counts in milliseconds


STEPPER_CELLS = ("llm = LLM(", "greedy = SamplingParams(", "small = LLM(", "stepper = Stepper(", "stepper.run()")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the notebooks: JupyterLab saves what it has open. Of chapter 00 only what the stepper needs."""
    folder = Path(shutil.copytree(NOTEBOOKS, tmp_path_factory.mktemp("lab") / "notebooks"))
    path = folder / "00_quickstart.ipynb"
    notebook = json.loads(path.read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    wanted = [any(words in source for words in STEPPER_CELLS) for source in sources]
    notebook["cells"] = [cell for cell, is_wanted in zip(notebook["cells"], wanted) if is_wanted]
    assert len(notebook["cells"]) == len(STEPPER_CELLS)
    path.write_text(json.dumps(notebook))
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """`nanovllm lab` on that copy; yields the address that it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "log.txt"
    code = SERVE.format(folder=str(folder), arguments=["lab", "--no-browser", "--port", str(port)])
    settings = folder.parent / "settings"
    notebook_settings = settings / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    notebook_settings.parent.mkdir(parents=True)
    notebook_settings.write_text(
        json.dumps({"windowingMode": "none"})
    )  # all cells are in the page, not the visible ones
    folders = {"JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(settings / "workspaces")}
    environment = os.environ | folders  # not this user's own, which may have other notebooks open
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-c", code], stdout=file, stderr=file, cwd=folder.parent, env=environment
        )
    try:
        for _ in range(600):
            found = re.search(r"http://127\.0\.0\.1\S+\?token=\w+", log.read_text())
            if found:
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        assert found, log.read_text()
        yield found.group()
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page(address: str) -> Iterator["sync_api.Page"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(address)
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=2 * MINUTES)
        run_all(page)
        yield page
        browser.close()


def run_all(page: "sync_api.Page") -> None:
    """Run all cells, and wait until none has a star any more."""
    sync_api.expect(page.get_by_text("| Idle")).to_be_visible(timeout=MINUTES)  # in the status bar: the kernel is there
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Run All Cells$")).click()
    stars = page.locator(".jp-CodeCell .jp-InputPrompt").filter(has_text="*")
    sync_api.expect(stars).not_to_have_count(0, timeout=MINUTES)
    sync_api.expect(stars).to_have_count(0, timeout=4 * MINUTES)


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
    area.get_by_role("textbox", name="Prompt").press_sequentially(
        "a b"
    )  # `a` and `b` insert cells in Lab's command mode
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
    path = folder / "00_quickstart.ipynb"
    before = path.read_text()
    page.keyboard.press("Control+s")
    for _ in range(100):
        saved = path.read_text()
        if saved != before and saved.endswith("}\n"):  # all of it
            break
        time.sleep(0.2)
    notebook = json.loads(saved)
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert not any(WIDGET in output.get("data", {}) for output in outputs)
    assert any(output.get("metadata", {}).get("image/png", {}).get("widget") == "Stepper" for output in outputs)
    assert "widgets" not in notebook["metadata"]
