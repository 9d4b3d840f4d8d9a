"""The stepper: an engine with buttons. Each press of Step is one `llm.step()`, and you see what it changed."""

from collections.abc import Callable, Iterable
from html import escape
from itertools import repeat
from threading import Lock
from time import sleep
from typing import Any

import ipywidgets as widgets

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.viz.controls import Controls
from nanovllm.viz.frames import Frames, RequestFrame
from nanovllm.viz.player import Player
from nanovllm.viz.theme import colour, ink_on, picture_bundle

CELL = "text-align:left;padding:2px 14px 2px 0;vertical-align:top;line-height:1.5"


class Stepper:
    """Buttons on a live engine; below them its KV cache and its timeline, which follow.

    Every button is a method, too. An error of the engine is shown as a sentence, and the stepper stays usable. It
    watches through a trace, `stepper.trace`, and so shows what others do with the engine as well.

    Args:
        llm: the engine to drive. It may have requests already; they go on.
        max_tokens: how many tokens an answer may have, unless a request says otherwise.
    """

    def __init__(self, llm: LLM, max_tokens: int = 12) -> None:
        self.llm = llm
        self.message = "Nothing has happened yet."
        self.max_tokens = max_tokens
        self._lock = Lock()
        self._controls, self._answers = Controls(self._pressed, max_tokens), widgets.HTML()
        self.widget = widgets.VBox()
        self._watch()

    def _watch(self) -> None:
        """Begin a new trace."""
        self.trace = self.llm.trace()
        self.frames = Frames(self.trace)
        self.player = Player(self.frames)
        self.widget.children = [self._controls, self.player, self._answers]
        self._refresh()

    # -- What the buttons do -------------------------------------------------------------------------------------------

    def step(self, num_steps: int = 1) -> None:
        """Make `num_steps` steps, or fewer if nothing is left to do."""
        self._steps(range(num_steps))

    def run(self) -> None:
        """Make steps until every request is finished."""
        self._steps(repeat(None))

    def add_request(self, prompt: str | list[int], params: SamplingParams | None = None) -> None:
        """Queue a request; greedy, and of `max_tokens` tokens at most, unless `params` says otherwise."""
        params = params or SamplingParams(temperature=0, max_tokens=self.max_tokens)

        def add() -> None:
            self.message = f"{self.frames.name(self.llm.add_request(prompt, params))} waits."

        self._guarded(add)

    def abort(self, request: str | int) -> None:
        """End an unfinished request, given by its letter or its id."""

        def abort() -> None:
            ids: dict[str | int, int] = {}
            for r in self.unfinished():
                ids[r.name] = ids[r.id] = r.id
            if request not in ids:
                raise KeyError(f"no unfinished request is called {request!r}")
            self.llm.abort(ids[request])
            self.message = f"{self.frames.name(ids[request])} is aborted."

        self._guarded(abort)

    def reset(self) -> None:
        """Abort all requests, empty the prefix cache, and begin a new trace: its first request is A again."""

        def reset() -> None:
            for request in self.unfinished():
                self.llm.abort(request.id)
            self.llm.reset_prefix_cache()
            self.trace.close()
            self.message = "All is as new."
            self._watch()

        self._guarded(reset)

    def _pressed(self, button: str, prompt: str, max_tokens: int, request: str) -> None:
        """A button, and what the boxes said when it was pressed."""
        match button:
            case "add":
                self.add_request(prompt, SamplingParams(temperature=0, max_tokens=max_tokens))
            case "step":
                self.step()
            case "ten":
                self.step(10)
            case "run":
                self.run()
            case "abort":
                self.abort(request)
            case "reset":
                self.reset()

    def _steps(self, times: Iterable[Any]) -> None:
        for _ in times:
            went_well = self._guarded(self._one_step, "The step failed")
            sleep(0.001)  # whoever pressed another button meanwhile has a turn
            if not went_well or not self.llm.has_unfinished_requests():
                break

    def _one_step(self) -> None:
        if not self.llm.has_unfinished_requests():
            self.message = "Nothing to do: add a request."
            return
        self.llm.step()
        left = len(self.unfinished())
        self.message = f"{left} unfinished." if left else "All requests are finished."

    def _guarded(self, action: Callable[[], None], failure: str = "The engine refused") -> bool:
        """Do it, and say in the widget what went wrong: a traceback of a button press would be seen nowhere.

        In JupyterLab a button may be pressed while another one's work goes on, in a thread of its own; the engine is
        used by one at a time. Returns whether all went well.
        """
        with self._lock:
            try:
                action()
                return True
            except KeyError as error:
                self.message = f"{failure}: {error.args[0]}"  # as text, a KeyError is in quotes
                return False
            except Exception as error:
                self.message = f"{failure}: {error}"
                return False
            finally:
                self._refresh()

    # -- What is seen --------------------------------------------------------------------------------------------------

    def unfinished(self) -> list[RequestFrame]:
        """The requests that are not over, in the order of coming."""
        return [request for request in self.frames[-1].requests if not request.is_over]

    def answer(self, request: RequestFrame) -> str:
        """What a request has generated so far."""
        return self.frames.text(request, request.num_prompt_tokens, request.num_tokens)

    def __str__(self) -> str:
        answers = [f"{r.name} answered {self.answer(r)!r}" for r in self.frames[-1].requests if self.answer(r)]
        return "\n".join([self.message, self.player.text(), *answers])

    __repr__ = __str__

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = picture_bundle(self.player.figure(), str(self), self.player.alt(), widget="Stepper")
        return self.widget._repr_mimebundle_(**kwargs) | data, metadata

    def _refresh(self) -> None:
        self.player.update()
        self._controls.unfinished = [request.name for request in self.unfinished()]
        self._controls.message = self.message
        rows = [
            f'<tr><td style="{CELL}">{badge(r.name)}</td><td style="{CELL}">{r.status}</td>'
            f'<td style="{CELL}">{escape(self.answer(r))}</td></tr>'
            for r in self.frames[-1].requests
        ]
        head = "".join(f'<th scope="col" style="{CELL}">{name}</th>' for name in ("request", "status", "answer so far"))
        table = f'<table style="border-collapse:collapse"><tr>{head}</tr>{"".join(rows)}</table>'
        self._answers.value = table if rows else ""


def badge(name: str) -> str:
    """A request's letter on its colour."""
    style = f"background:{colour(name)};color:{ink_on(colour(name))};padding:0 .5em;border-radius:3px;font-weight:bold"
    return f'<span style="{style}">{name}</span>'
