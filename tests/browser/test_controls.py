"""The stepper's controls on a page of their own: what a press tells the kernel, and what the kernel's word shows."""

from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm.viz.live import STATIC

from .chromium import sync_api
from .test_widgets import browser  # noqa: F401  # a fixture

# A model as anywidget gives one to a view; it writes down what is sent.
SHOW = """async ([source, state]) => {
    const module = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
    window.sent = [];
    window.keys = [];
    document.addEventListener("keydown", (event) => keys.push(event.key));
    let changed;
    window.tell = (news) => { Object.assign(state, news); changed(); };
    module.default.render({
        el: document.body,
        model: {
            get: (name) => state[name],
            send: (content) => sent.push(content),
            on: (_, show) => { changed = show; },
        },
    });
}"""
STATE = {"max_tokens": 12, "unfinished": ["A", "B"], "message": "2 unfinished."}


@pytest.fixture
def page(browser) -> Iterator["sync_api.Page"]:
    page = browser.new_page()
    page.evaluate(SHOW, [(STATIC / "controls.js").read_text(), STATE])
    yield page
    page.close()


def sent(page: "sync_api.Page") -> list[dict[str, Any]]:
    """What has been sent since the last look."""
    return page.evaluate("sent.splice(0)")


def test_a_press_is_one_message_with_all_that_the_boxes_say(page):
    """So that nothing that was typed can come later than the press."""
    for name, button in {
        "Add a request": "add",
        "Step": "step",
        "Step ×10": "ten",
        "Run": "run",
        "Reset": "reset",
    }.items():
        page.get_by_role("textbox", name="Prompt").fill(f"before {button}")
        page.get_by_role("spinbutton", name="Length").fill("7")
        page.get_by_role("button", name=name, exact=True).click()
        assert sent(page) == [{"button": button, "prompt": f"before {button}", "max_tokens": 7, "request": "A"}]


def test_enter_adds_a_request_and_no_key_leaves_but_with_ctrl(page):
    page.get_by_role("textbox", name="Prompt").fill("")
    page.get_by_role("textbox", name="Prompt").press_sequentially("a b")  # insert cells in Lab's command mode
    page.keyboard.press("Enter")
    assert [(message["button"], message["prompt"]) for message in sent(page)] == [("add", "a b")]
    assert page.evaluate("keys") == []
    page.keyboard.press("Control+s")
    assert page.evaluate("keys") == ["Control", "s"], "JupyterLab saves"


@pytest.mark.parametrize("length", ["", "0", "-3", "2.5"])
def test_a_length_that_is_none_is_not_sent(page, length):
    page.get_by_role("spinbutton", name="Length").fill(length)
    page.get_by_role("button", name="Add a request").click()
    assert sent(page) == []


def test_the_chosen_request_stays_chosen(page):
    page.get_by_role("combobox", name="Request").select_option("B")
    page.evaluate("tell({ unfinished: ['A', 'B', 'C'] })")
    page.get_by_role("button", name="Abort").click()
    assert [(message["button"], message["request"]) for message in sent(page)] == [("abort", "B")]
    page.evaluate("tell({ unfinished: ['A', 'C'] })")
    sync_api.expect(page.get_by_role("combobox", name="Request")).to_have_value("A")
    page.evaluate("tell({ unfinished: [] })")
    sync_api.expect(page.get_by_role("button", name="Abort")).to_be_disabled()


def test_controls_have_names(page):
    """Those of the boxes: the tests above find them by it."""
    buttons = page.get_by_role("button").all()
    assert len(buttons) == 6 and all(button.inner_text() and button.get_attribute("title") for button in buttons)
    assert page.get_by_role("status").get_attribute("aria-live") == "polite"
    assert page.get_by_role("textbox", name="Prompt").input_value() == "The sun rises in the"
    assert page.get_by_role("spinbutton", name="Length").input_value() == "12"


def test_markup_in_a_message_is_shown_as_text(page):
    page.evaluate("tell({ message: '<b>bold</b>' })")
    sync_api.expect(page.get_by_role("status")).to_have_text("<b>bold</b>")
