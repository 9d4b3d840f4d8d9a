"""The stepper, without a browser: its methods, its buttons, and the three forms in which it is shown."""

import base64
from threading import Thread
from time import sleep

import pytest

from nanovllm import SamplingParams
from nanovllm.lessons.tiny import tiny_llm
from nanovllm.viz.figures import cache_map_alt
from nanovllm.viz.frames import RequestFrame
from nanovllm.viz.stepper import Stepper
from nanovllm.viz.theme import COLOURS, colour, ink_on, letter

WIDGET = "application/vnd.jupyter.widget-view+json"
LONG = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture
def stepper():
    return Stepper(tiny_llm(num_kv_blocks=8, max_num_batched_tokens=32))


def shown(stepper: Stepper) -> str:
    """What a reader sees of the stepper's own, around the player."""
    return stepper._controls.message + stepper._answers.value


def press(stepper: Stepper, button: str, **boxes) -> None:
    """As the browser tells it: the button, and what all boxes say."""
    content = {"button": button, "prompt": "", "max_tokens": 12, "request": ""} | boxes
    stepper._controls._handle_custom_msg(content, [])


def requests(stepper: Stepper) -> tuple[RequestFrame, ...]:
    """The requests in the frame that the player shows."""
    return stepper.frames[stepper.player.index].requests


def test_steps_are_the_engines(stepper):
    stepper.add_request([7] * 27, LONG)
    stepper.step(3)
    assert stepper.llm.engine.num_steps == len(stepper.trace.steps) == 3
    (a,) = requests(stepper)
    assert (a.name, a.status, a.num_tokens, a.num_computed_tokens, a.block_table) == ("A", "decode", 30, 29, (0, 1))
    assert str(stepper).startswith("1 unfinished.\nstep 2: A generates one token.\n1 running, 0 waiting, ")


def test_a_request_is_seen_before_its_first_step(stepper):
    stepper.add_request([7] * 4)
    assert stepper.message == "A waits." and [r.status for r in requests(stepper)] == ["waiting"]
    stepper.step(1)
    stepper.add_request([7] * 4)
    assert stepper.message == "B waits." and [r.status for r in requests(stepper)] == ["prefill", "waiting"]


def test_a_shared_block_has_two_owners(stepper):
    for last in (1, 2):
        stepper.add_request([7] * 16 + [last], LONG)
    stepper.step()
    assert "block   0  |################|  A and B" in str(stepper)
    assert "A holds blocks 0 and 1. B holds blocks 0 and 2." in cache_map_alt(stepper.frames, 1)


def test_run_and_what_is_kept(stepper):
    stepper.add_request([7] * 17, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    stepper.run()
    assert stepper.message == "All requests are finished." and not stepper.llm.has_unfinished_requests()
    assert "block   0  |~~~~~~~~~~~~~~~~|  kept, #8 in the queue" in str(stepper)
    assert "A answered '<" in str(stepper)
    stepper.step()
    assert stepper.message == "Nothing to do: add a request."


def test_preemption_is_told(stepper):
    for last in (1, 2, 3):
        stepper.add_request([last] * 32, LONG)
    stepper.run()
    told = [stepper.frames[i].sentence for i in range(len(stepper.frames))]
    assert any(
        sentence.startswith("C needs a block, none is free; it came last, so it is preempted") for sentence in told
    )
    assert [r.status for r in requests(stepper)] == ["finished"] * 3


def test_abort_by_letter_and_by_id(stepper):
    for last in (1, 2):
        stepper.add_request([last] * 8, LONG)
    stepper.step()
    stepper.abort("B")
    assert stepper.message == "B is aborted." and [r.status for r in requests(stepper)] == ["prefill", "aborted"]
    stepper.abort("B")
    assert stepper.message == "The engine refused: no unfinished request is called 'B'"
    stepper.abort(0)
    assert stepper.message == "A is aborted." and not stepper.llm.has_unfinished_requests()


def test_reset(stepper):
    for last in (1, 2):
        stepper.add_request([last] * 17, LONG)
    stepper.step(2)
    stepper.reset()
    assert not stepper.llm.has_unfinished_requests() and stepper.message == "All is as new."
    assert len(stepper.trace.steps) == 0 and not requests(stepper) and len(stepper.llm.engine.recorders) == 1
    assert "8 blocks in use, 0 kept" in str(stepper) and stepper.player in stepper.widget.children
    stepper.add_request([1] * 17)
    stepper.step()
    (a,) = requests(stepper)
    assert a.name == "A" and a.num_hit_tokens == 0


def test_buttons_do_what_the_methods_do(stepper):
    stepper.add_request([7] * 20, LONG)
    press(stepper, "step")
    assert len(stepper.trace.steps) == 1
    press(stepper, "ten")
    assert len(stepper.trace.steps) == 11 and "1 unfinished." in shown(stepper)
    stepper.add_request([7] * 20, LONG)
    assert stepper._controls.unfinished == ["A", "B"]
    press(stepper, "abort", request="B")
    assert "B is aborted." in shown(stepper) and stepper._controls.unfinished == ["A"]
    press(stepper, "run")
    assert [r.status for r in requests(stepper)] == ["finished", "aborted"] and not stepper._controls.unfinished
    press(stepper, "reset")
    assert len(stepper.trace.steps) == 0


def test_the_length_of_an_answer():
    stepper = Stepper(tiny_llm(num_kv_blocks=8), max_tokens=3)
    assert stepper._controls.max_tokens == 3
    stepper.add_request([7] * 4)
    press(stepper, "add", prompt=[7] * 4, max_tokens=2)
    stepper.run()
    assert [len(r.output_token_ids) for r in stepper.trace.requests.values()] == [3, 2]


def test_an_error_is_a_sentence_and_the_stepper_stays_usable(stepper):
    press(stepper, "add", prompt="text")
    assert "The engine refused: this model's folder has no tokenizer" in shown(stepper)
    stepper.add_request([7] * 4, LONG)
    stepper.step()
    assert [r.status for r in requests(stepper)] == ["prefill"]


def test_a_step_that_fails_is_told(stepper, monkeypatch):
    stepper.add_request([7] * 4, LONG)
    with monkeypatch.context() as patch:
        patch.setattr(stepper.llm.engine.model_runner, "launch", lambda batch: 1 / 0)
        stepper.step(5)
    assert stepper.message == "The step failed: division by zero"
    assert "step 0: The step fails (division by zero)" in str(stepper) and len(stepper.trace.steps) == 1
    stepper.run()
    assert [r.status for r in requests(stepper)] == ["finished"]


def test_buttons_pressed_while_it_runs(stepper):
    """In JupyterLab that happens in another thread."""
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    stepper.add_request([7] * 4, params)
    stepper.add_request([8] * 4, params)
    running = Thread(target=stepper.run)
    running.start()
    while not stepper.trace.steps:
        sleep(0.001)
    stepper.abort("B")
    assert stepper.frames[-1].requests[1].status == "aborted"
    running.join(60)
    assert stepper.message == "All requests are finished."
    assert [r.status for r in requests(stepper)] == ["finished", "aborted"]
    assert len(stepper.trace.requests[1].output_token_ids) < 100


def test_markup_in_texts_is_shown_as_text(stepper):
    stepper.add_request([7] * 4, LONG)
    stepper.step()
    (token_id,) = stepper.trace.requests[0].output_token_ids
    assert f"&lt;{token_id}&gt;" in shown(stepper), "a token without a text is its number in angle brackets"


def test_requests_from_elsewhere_appear(stepper):
    stepper.llm.add_request([7] * 4, LONG)
    stepper.step()
    assert [request.name for request in requests(stepper)] == ["A"]


def test_it_begins_with_what_is_there():
    llm = tiny_llm(num_kv_blocks=8, max_num_batched_tokens=32)
    llm.add_request([7] * 20, LONG)
    llm.step()
    llm.add_request([8] * 20, LONG)
    stepper = Stepper(llm)
    assert [(r.name, r.status) for r in requests(stepper)] == [("A", "decode"), ("B", "waiting")]
    assert stepper._controls.unfinished == ["A", "B"]


def test_bundle_of_three(stepper):
    stepper.add_request([7] * 27, LONG)
    stepper.step()
    data, metadata = stepper._repr_mimebundle_()
    assert data.keys() == {WIDGET, "image/png", "text/plain"}
    assert data[WIDGET]["model_id"] == stepper.widget.model_id
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["text/plain"] == repr(stepper) == str(stepper)
    assert "0x" not in repr(stepper)
    assert metadata == {"image/png": {"alt": stepper.player.alt(), "widget": "Stepper"}}


def test_letters_and_colours():
    assert [letter(i) for i in (0, 25, 26, 52)] == ["A", "Z", "A1", "A2"]
    assert colour("A") == COLOURS[0] and colour("I") == COLOURS[0] and colour("B1") == COLOURS[1]
    assert ink_on("#0072B2") == "white" and ink_on("#F0E442") == "black"
