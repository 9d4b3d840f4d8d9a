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
        self._lock = Lock()
        self._prompt = widgets.Text(
            value="The sun rises in the", description="Prompt", layout=widgets.Layout(flex="1 1 16em", width="auto")
        )
        self._length = widgets.BoundedIntText(
            value=max_tokens, min=1, max=10**6, description="Length", layout=widgets.Layout(width="11em")
        )
        self._length.tooltip = "How many tokens the answer may have"
        self._unfinished = widgets.Dropdown(description="Request", layout=widgets.Layout(width="11em"))
        self._step_button = self._button("Step", "Make one step of the engine", self.step)
        self._ten_button = self._button("Step ×10", "Make ten steps", lambda: self.step(10))
        self._run_button = self._button("Run", "Make steps until every request is finished", self.run)
        self._add_button = self._button("Add a request", "Queue the prompt in the text box", self._add_typed)
        self._abort_button = self._button("Abort", "End this request now", lambda: self.abort(self._unfinished.value))
        self._reset_button = self._button("Reset", "Abort all, empty the prefix cache, begin anew", self.reset)
        self._message, self._answers = widgets.HTML(), widgets.HTML()
        row = widgets.Layout(flex_flow="row wrap", align_items="center")
        adding = widgets.HBox([self._prompt, self._length, self._add_button], layout=row)
        stepping = [self._step_button, self._ten_button, self._run_button]
        ending = [self._unfinished, self._abort_button, self._reset_button]
        self.widget = widgets.VBox([adding, widgets.HBox([*stepping, *ending], layout=row), self._message])
        self._controls = self.widget.children
        self._watch()

    def _watch(self) -> None:
        """Begin a new trace."""
        self.trace = self.llm.trace()
        self.frames = Frames(self.trace)
        self.player = Player(self.frames)
        self.widget.children = [*self._controls, self.player, self._answers]
        self._refresh()

    # -- What the buttons do -------------------------------------------------------------------------------------------

    def step(self, num_steps: int = 1) -> None:
        """Make `num_steps` steps, or fewer if nothing is left to do."""
        self._steps(range(num_steps))

    def run(self) -> None:
        """Make steps until every request is finished."""
        self._steps(repeat(None))

    def add_request(self, prompt: str | list[int], params: SamplingParams | None = None) -> None:
        """Queue a request; greedy, and as long as the box "Length" says, unless `params` says otherwise."""
        params = params or SamplingParams(temperature=0, max_tokens=self._length.value)

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

    def _add_typed(self) -> None:
        self.add_request(self._prompt.value)

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

    def _button(self, label: str, tooltip: str, action: Callable[[], None]) -> widgets.Button:
        button = widgets.Button(description=label, tooltip=tooltip, layout=widgets.Layout(width="auto"))
        button.on_click(lambda _: action())
        return button

    def _refresh(self) -> None:
        self.player.update()
        chosen, names = self._unfinished.value, [request.name for request in self.unfinished()]
        self._unfinished.options = names
        self._unfinished.value = chosen if chosen in names else next(iter(names), None)
        self._abort_button.disabled = not names
        self._message.value = f'<div role="status" aria-live="polite"><b>{escape(self.message)}</b></div>'
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
