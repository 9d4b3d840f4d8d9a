"""The memory calculator of chapter 01 in a real JupyterLab: it answers to mouse and keys, with no model loaded."""

from collections.abc import Iterator

import pytest

from .chromium import sync_api
from .lab import Cells, chapter_in_lab

IMPORTS = "from collections import namedtuple\nfrom nanovllm.lessons import show"
ERRORS: list[str] = []  # what JavaScript threw and nobody caught, and what the console shows as an error


def without_the_model(all_cells: Cells) -> Cells:
    cells = {cell["id"]: cell for cell in all_cells}
    cells["setup"]["source"] = IMPORTS
    cells["models"]["source"] = "".join(cells["models"]["source"]).split("kept = ")[0]  # before the model is asked
    return [cells[id] for id in ("setup", "models", "models-table", "calculator")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator["sync_api.Page"]:
    with chapter_in_lab(tmp_path_factory.mktemp("lab"), "01_kv_cache", without_the_model, ERRORS) as page:
        yield page


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
