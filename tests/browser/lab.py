"""`nanovllm lab` as a reader has it, with a chapter opened in Chromium and run."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanovllm.lessons.series import NOTEBOOKS

from .chromium import ARGUMENTS, CHROMIUM, sync_api

SERVE = "import nanovllm.__main__ as m, pathlib; m.NOTEBOOKS = pathlib.Path({folder!r}); m.main({arguments})"
MINUTES = 60_000  # Playwright counts in milliseconds

Cells = list[dict[str, Any]]


@contextmanager
def chapter_in_lab(
    folder: Path,
    name: str,
    choose: Callable[[Cells], Cells] = lambda cells: cells,
    errors: list[str] | None = None,
    viewport: tuple[int, int] = (1280, 800),
) -> Iterator["sync_api.Page"]:
    """Serve a copy of the notebooks from an empty `folder`, open the chapter called `name`, and run its cells.

    `choose` takes all cells and returns those to keep. `errors` collects what JavaScript threw and nobody caught, and
    what the console shows as an error.
    """
    path = Path(shutil.copytree(NOTEBOOKS, folder / "notebooks")) / f"{name}.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"] = choose(notebook["cells"])
    path.write_text(json.dumps(notebook))
    told = [] if errors is None else errors
    with served(path.parent) as address, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport=dict(zip(("width", "height"), viewport)))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("console", lambda m: told.append(f"{m.text} ({m.location['url']})") if m.type == "error" else None)
        page.goto(address.replace("00_quickstart", name))
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=2 * MINUTES)
        run_all(page)
        yield page
        browser.close()


def with_ids(*ids: str) -> Callable[[Cells], Cells]:
    """Keep the cells with these ids, all of which there must be."""

    def choose(cells: Cells) -> Cells:
        chosen = [cell for cell in cells if cell["id"] in ids]
        assert len(chosen) == len(ids)
        return chosen

    return choose


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """`nanovllm lab` on the notebooks in `folder`; yields the address that it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "log.txt"
    code = SERVE.format(folder=str(folder), arguments=["lab", "--no-browser", "--port", str(port)])
    settings = folder.parent / "settings"
    notebook_settings = settings / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    notebook_settings.parent.mkdir(parents=True)
    # All cells are in the page, not the visible ones.
    notebook_settings.write_text(json.dumps({"windowingMode": "none"}))
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


def run_all(page: "sync_api.Page") -> None:
    """Run all cells, and wait until none has a star any more."""
    sync_api.expect(page.get_by_text("| Idle")).to_be_visible(timeout=MINUTES)  # in the status bar: the kernel is there
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Run All Cells$")).click()
    stars = page.locator(".jp-CodeCell .jp-InputPrompt").filter(has_text="*")
    sync_api.expect(stars).not_to_have_count(0, timeout=MINUTES)
    sync_api.expect(stars).to_have_count(0, timeout=4 * MINUTES)
