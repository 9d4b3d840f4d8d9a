"""Chapter 06 in a real JupyterLab: three ranks are started, and the map shows what they say of themselves."""

from collections.abc import Iterator

import pytest

from .chromium import sync_api
from .lab import chapter_in_lab, with_ids

CELLS = with_ids("setup", "start", "same-tokens", "map", "pays", "explorer")
ERRORS: list[str] = []  # what JavaScript threw and nobody caught, and what the console shows as an error


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator["sync_api.Page"]:
    with chapter_in_lab(tmp_path_factory.mktemp("lab"), "06_tensor_parallelism", CELLS, ERRORS) as page:
        yield page


def test_three_ranks_answer_as_one(page):
    assert page.get_by_text("Traceback (most recent call last)").count() == 0
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    sync_api.expect(page.get_by_text("32 steps each, with the same plan")).to_be_visible()


def test_the_map_shows_what_a_rank_holds(page):
    area = page.locator(".nanovllm").first
    sentence = area.locator(".nanovllm-sentence")
    sync_api.expect(sentence).to_contain_text("Each of 3 ranks holds 1,180,800 of 3,540,096 numbers (33.4%)")
    area.get_by_label("rank", exact=True).select_option(label="1")
    sync_api.expect(sentence).to_contain_text("rows 64 to 127 of k_proj and v_proj")
    assert area.locator(".nanovllm-pale").count() == 7 * 2
    area.get_by_label("part", exact=True).focus()
    page.keyboard.press("End")
    sync_api.expect(sentence).to_contain_text("rows 16,384 to 32,767 of embed_tokens")
    area.get_by_label("run", exact=True).select_option(label="one rank")
    sync_api.expect(sentence).to_contain_text("This run has no rank 1.")


def test_the_explorer_answers(page):
    area, cells = page.locator(".nanovllm").last, page.locator(".jp-Cell").count()
    sync_api.expect(area).to_contain_text("8 GPUs 2.9")
    area.get_by_label("all reduce", exact=True).select_option(label="pairs")
    sync_api.expect(area).to_contain_text("8 GPUs 4.0")
    area.get_by_role("slider", name="tokens").focus()
    page.keyboard.press("End")
    page.keyboard.press("b")
    sync_api.expect(area).to_contain_text("8 GPUs 2.7")
    assert page.locator(".jp-Cell").count() == cells, "no key reaches Lab"
    assert ERRORS == []
