"""The memory calculator of chapter 01 in a real JupyterLab: it answers to mouse and keys, with no model loaded."""

import json
from collections.abc import Iterator

import pytest

from .chromium import ARGUMENTS, CHROMIUM, sync_api
from .test_lab import MINUTES, address, folder, run_all  # noqa: F401  # two of them are fixtures

IMPORTS = "from collections import namedtuple\nfrom nanovllm.lessons import show"
ERRORS: list[str] = []  # what JavaScript threw and nobody caught, and what the console shows as an error


@pytest.fixture(scope="module")
def page(address: str, folder) -> Iterator["sync_api.Page"]:  # noqa: F811
    path = folder / "01_kv_cache.ipynb"
    notebook = json.loads(path.read_text())
    cells = {cell["id"]: cell for cell in notebook["cells"]}
    cells["setup"]["source"] = IMPORTS
    cells["models"]["source"] = "".join(cells["models"]["source"]).split("kept = ")[0]  # before the model is asked
    notebook["cells"] = [cells[id] for id in ("setup", "models", "models-table", "calculator")]
    path.write_text(json.dumps(notebook))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.on("pageerror", lambda error: ERRORS.append(str(error)))
        page.on("console", lambda m: ERRORS.append(f"{m.text} ({m.location['url']})") if m.type == "error" else None)
        page.goto(address.replace("00_quickstart", "01_kv_cache"))
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=2 * MINUTES)
        run_all(page)
        yield page
        browser.close()


def test_the_calculator_answers(page):
    calculator = page.locator(".nanovllm")
    sentence = calculator.locator("div[role=status]")
    sync_api.expect(sentence).to_have_text(
        "Weights 16.1 GB, KV cache 17.2 GB. At most so many such sequences fit: T4 0, laptop 5, H100 52."
    )
    calculator.get_by_role("slider", name="batch").focus()
    page.keyboard.press("ArrowRight")
    sync_api.expect(sentence).to_contain_text("KV cache 68.7 GB")
    calculator.get_by_role("combobox", name="dtype").select_option("int8")
    sync_api.expect(sentence).to_contain_text("KV cache 34.4 GB. At most so many such sequences fit: T4 11")
    page.keyboard.press("b")
    assert page.locator(".jp-Cell").count() == 4, "no key reaches Lab"
    assert ERRORS == []
