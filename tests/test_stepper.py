"""The stepper, without a browser: its methods, its buttons, and the three forms in which it is shown."""

import base64

import pytest

from nanovllm import SamplingParams
from nanovllm.lessons.tiny import tiny_llm
from nanovllm.viz.snapshot import MAX_DRAWN_BLOCKS, Snapshot
from nanovllm.viz.stepper import Stepper
from nanovllm.viz.theme import COLOURS, colour, ink_on, letter

WIDGET = "application/vnd.jupyter.widget-view+json"
LONG = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture
def stepper():
    return Stepper(tiny_llm(num_kv_blocks=8, max_num_batched_tokens=32))


def shown(stepper: Stepper) -> str:
    """What a reader sees in the live widget."""
    return stepper._message.value + stepper._requests.value + stepper._blocks.value


def test_steps_are_the_engines(stepper):
    stepper.add_request([7] * 27, LONG)
    stepper.step(3)
    assert stepper.llm.engine.num_steps == stepper.num_steps == 3
    (state,) = stepper.snapshot().requests
    assert (state.name, state.status, state.num_tokens, state.num_computed_tokens) == ("A", "running", 30, 29)
    assert state.block_table == (0, 1)
    assert str(stepper).startswith("Step 3. A 28 → 29 computed.\n1 running, 0 waiting, 2 of 8 blocks in use")


def test_a_shared_block_has_two_owners(stepper):
    for last in (1, 2):
        stepper.add_request([7] * 16 + [last], LONG)
    stepper.step()
    assert [block.owners for block in stepper.snapshot().blocks[:4]] == [("A", "B"), ("A",), ("B",), ()]
    assert "block   0  |################|  A and B" in str(stepper)
    assert "block 0 belongs to A and B" in stepper.snapshot().alt


def test_a_cached_block_is_kept(stepper):
    stepper.add_request([7] * 17, SamplingParams(temperature=0, max_tokens=1))
    stepper.run()
    assert stepper.snapshot().blocks[0].cached and not stepper.snapshot().blocks[0].owners
    assert "block   0  |~~~~~~~~~~~~~~~~|  free, content kept" in str(stepper)
    assert "A is finished." in stepper.message


def test_preemption_is_told(stepper):
    for last in (1, 2, 3):
        stepper.add_request([last] * 32, LONG)
    for _ in range(200):
        stepper.step()
        if "preempted" in stepper.message:
            break
    assert "C is preempted: it gives its blocks back and waits." in stepper.message
    stepper.run()
    assert not stepper.llm.has_unfinished_requests()


def test_buttons_do_what_the_methods_do(stepper):
    stepper._prompt.value = ""
    stepper.add_request([7] * 20, LONG)
    stepper._step_button.click()
    assert stepper.num_steps == 1 and "A joins: 0 → 20 computed." in shown(stepper)
    stepper._run_button.click()
    assert "A is finished." in shown(stepper)
    stepper._step_button.click()
    assert "Nothing to do: add a request." in shown(stepper)


def test_an_error_is_a_sentence_and_the_stepper_stays_usable(stepper):
    stepper._prompt.value = "text"  # the tiny model has no tokenizer
    stepper._add_button.click()
    assert "The engine refused: this model" in shown(stepper)
    stepper.add_request([7] * 4, LONG)
    stepper.step()
    assert "A joins" in shown(stepper)


def test_markup_in_texts_is_shown_as_text(stepper):
    stepper.add_request([7] * 4, LONG)
    stepper.step()
    stepper.texts[0] = "<b>bold</b>"
    stepper._refresh()
    assert "&lt;b&gt;bold&lt;/b&gt;" in shown(stepper) and "<b>bold" not in shown(stepper)


def test_requests_from_elsewhere_appear(stepper):
    stepper.llm.add_request([7] * 4, LONG)
    stepper.step()
    assert [request.name for request in stepper.snapshot().requests] == ["A"]


def test_bundle_of_three(stepper):
    stepper.add_request([7] * 27, LONG)
    stepper.step()
    data, metadata = stepper._repr_mimebundle_()
    assert data.keys() == {WIDGET, "image/png", "text/plain"}
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["text/plain"] == repr(stepper) == str(stepper)
    assert "0x" not in repr(stepper)
    assert metadata == {"image/png": {"alt": stepper.snapshot().alt, "widget": "Stepper"}}


def test_controls_have_names(stepper):
    for button in (stepper._step_button, stepper._run_button, stepper._add_button):
        assert button.description and button.tooltip
    assert stepper._prompt.description == "Prompt"
    assert 'aria-live="polite"' in shown(stepper) and 'role="img" aria-label=' in shown(stepper)


def test_a_large_pool_is_cut():
    llm = tiny_llm(num_kv_blocks=200)
    snapshot = Snapshot.of(llm)
    assert f"and {200 - MAX_DRAWN_BLOCKS} blocks more" in str(snapshot)
    assert f"and {200 - MAX_DRAWN_BLOCKS} blocks more" in shown(Stepper(llm))


def test_letters_and_colours():
    assert [letter(i) for i in (0, 25, 26, 52)] == ["A", "Z", "A1", "A2"]
    assert colour("A") == COLOURS[0] and colour("I") == COLOURS[0] and colour("B1") == COLOURS[1]
    assert ink_on("#0072B2") == "white" and ink_on("#F0E442") == "black"
