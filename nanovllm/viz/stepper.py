"""The stepper: an engine with buttons. Each press of Step is one `llm.step()`, and you see what it changed."""

from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as widgets

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.viz.snapshot import MAX_DRAWN_BLOCKS, BlockState, Snapshot
from nanovllm.viz.theme import colour, ink_on, letter, picture_bundle

CELL = (
    "display:inline-flex;flex-direction:column;vertical-align:top;width:6.4em;margin:0 6px 6px 0;text-align:center;"
    "font-size:12px;line-height:1.5;color:var(--jp-ui-font-color1,#222)"
)
BOX = "height:3.2em;border:1px solid var(--jp-border-color1,#888);display:flex;flex-direction:column;overflow:hidden"


class Stepper:
    """Buttons Step, Run and Add a request on a live engine, with its requests and its KV cache blocks.

    Every button is a method, too. An error of the engine is shown as a sentence, and the stepper stays usable.

    Args:
        llm: the engine to drive. It may have requests already; they go on.
        max_tokens: how many tokens an answer may have, for requests added here.
    """

    def __init__(self, llm: LLM, max_tokens: int = 12) -> None:
        self.llm = llm
        self.max_tokens = max_tokens
        self.num_steps = 0
        self.message = "Nothing has happened yet."
        self.names: dict[int, str] = {}
        self.texts: dict[int, str] = {}  # answers of finished requests
        for request_id in llm.engine.requests:
            self._name(request_id)

        self._step_button = self._button("Step", "Make one step of the engine", lambda: self.step())
        self._run_button = self._button("Run", "Make steps until every request is finished", self.run)
        self._prompt = widgets.Text(
            value="The sun rises in the", description="Prompt", layout=widgets.Layout(flex="1 1 16em", width="auto")
        )
        self._add_button = self._button(
            "Add a request", "Queue the prompt in the text box", lambda: self.add_request(self._prompt.value)
        )
        self._message = widgets.HTML()
        self._requests = widgets.HTML()
        self._blocks = widgets.HTML()
        row = widgets.Layout(flex_flow="row wrap", align_items="center")
        controls = [self._step_button, self._run_button, self._prompt, self._add_button]
        self.widget = widgets.VBox([widgets.HBox(controls, layout=row), self._message, self._blocks, self._requests])
        self._refresh()

    # -- What the buttons do -------------------------------------------------------------------------------------------

    def step(self, num_steps: int = 1) -> None:
        """Make `num_steps` steps, or fewer if nothing is left to do."""
        self._guarded(lambda: self._steps(num_steps))

    def run(self) -> None:
        """Make steps until every request is finished."""
        self._guarded(lambda: self._steps(None))

    def add_request(self, prompt: str | list[int], params: SamplingParams | None = None) -> None:
        """Queue a request, greedy unless `params` says otherwise."""
        params = params or SamplingParams(temperature=0, max_tokens=self.max_tokens)

        def add() -> None:
            name = self._name(self.llm.add_request(prompt, params))
            self.message = f"Request {name} waits."

        self._guarded(add)

    def _steps(self, num_steps: int | None) -> None:
        if not self.llm.has_unfinished_requests():
            self.message = "Nothing to do: add a request."
            return
        while num_steps is None or num_steps > 0:
            before = self.snapshot()
            answers = self.llm.step()
            self.num_steps += 1
            for answer in answers:
                self.texts[answer["request_id"]] = answer["text"]
            finished = [self._name(answer["request_id"]) for answer in answers]
            self.message = f"Step {self.num_steps}. " + what_changed(before, self.snapshot(), finished)
            self._refresh()
            if not self.llm.has_unfinished_requests():
                break
            num_steps = None if num_steps is None else num_steps - 1

    def _guarded(self, action: Callable[[], None]) -> None:
        """Do it, and say in the widget what went wrong: a traceback of a button press would be seen nowhere."""
        try:
            action()
        except Exception as error:
            self.message = f"The engine refused: {error}"
        self._refresh()

    # -- What is seen --------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The state that is shown."""
        for request_id in self.llm.engine.requests:
            self._name(request_id)
        return Snapshot.of(self.llm, self.names)

    def __str__(self) -> str:
        lines = [self.message, str(self.snapshot())]
        lines += [f"{self.names[request_id]} answered {text!r}" for request_id, text in self.texts.items()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        snapshot = self.snapshot()
        data, metadata = picture_bundle(snapshot.figure(), str(self), snapshot.alt, widget="Stepper")
        live = self.widget._repr_mimebundle_(**kwargs)
        return live | data, metadata

    def _name(self, request_id: int) -> str:
        return self.names.setdefault(request_id, letter(len(self.names)))

    def _button(self, label: str, tooltip: str, action: Callable[[], None]) -> widgets.Button:
        button = widgets.Button(description=label, tooltip=tooltip, layout=widgets.Layout(width="auto"))
        button.on_click(lambda _: action())
        return button

    def _refresh(self) -> None:
        snapshot = self.snapshot()
        self._message.value = f'<div role="status" aria-live="polite"><b>{escape(self.message)}</b></div>'
        self._requests.value = self._requests_html(snapshot)
        cells = "".join(block_html(i, block, snapshot.block_size) for i, block in enumerate(drawn(snapshot)))
        more = len(snapshot.blocks) - MAX_DRAWN_BLOCKS
        rest = f"<div>and {more} blocks more</div>" if more > 0 else ""
        self._blocks.value = f'<div role="img" aria-label="{escape(snapshot.alt)}" style="max-width:56em;margin-top:8px">{cells}{rest}</div>'

    def _requests_html(self, snapshot: Snapshot) -> str:
        texts = {self.names[i]: request.text for i, request in self.llm.engine.requests.items()}
        if not (snapshot.requests or self.texts):
            return ""
        rows = [
            [badge(r.name), r.status, r.num_tokens, r.num_computed_tokens, list(r.block_table), escape(texts[r.name])]
            for r in snapshot.requests
        ]
        rows += [[badge(self.names[i]), "finished", "", "", "", escape(text)] for i, text in self.texts.items()]
        heads = ["request", "status", "tokens", "computed", "block&nbsp;table", "answer so far"]
        body = "".join("<tr>" + "".join(f'<td style="{TD}">{cell}</td>' for cell in row) + "</tr>" for row in rows)
        head = "".join(f'<th scope="col" style="{TD}">{name}</th>' for name in heads)
        return f'<table style="border-collapse:collapse"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


TD = "text-align:left;padding:2px 14px 2px 0;vertical-align:top;line-height:1.5;min-width:3.2em"


def what_changed(before: Snapshot, after: Snapshot, finished: list[str]) -> str:
    """The step between two snapshots in a sentence or two."""
    old = {request.name: request for request in before.requests}
    sentences = []
    for new in after.requests:
        was = old.get(new.name)
        if was is not None and was.status == "running" and new.status == "waiting":
            sentences.append(f"{new.name} is preempted: it gives its blocks back and waits.")
        elif was is not None and new.num_computed_tokens > was.num_computed_tokens:
            joins = "joins: " if was.status == "waiting" else ""
            sentences.append(f"{new.name} {joins}{was.num_computed_tokens} → {new.num_computed_tokens} computed.")
    sentences += [f"{name} is finished." for name in finished]
    return " ".join(sentences)


def drawn(snapshot: Snapshot) -> tuple[BlockState, ...]:
    return snapshot.blocks[:MAX_DRAWN_BLOCKS]


def badge(name: str) -> str:
    """A request's letter on its colour."""
    style = f"background:{colour(name)};color:{ink_on(colour(name))};padding:0 .5em;border-radius:3px;font-weight:bold"
    return f'<span style="{style}">{name}</span>'


def block_html(index: int, block: BlockState, block_size: int) -> str:
    """A block of the pool: its owners as bands as wide as it is filled, its id below."""
    if block.owners:
        width = f"{100 * block.filled / block_size:.0f}%"
        bands = "".join(
            f'<div style="flex:1;width:{width};background:{colour(name)};color:{ink_on(colour(name))};'
            f'font-weight:bold;line-height:1.3;text-align:left;padding-left:3px;box-sizing:border-box">{name}</div>'
            for name in block.owners
        )
    else:
        bands = f'<div style="margin:auto;opacity:.75">{"kept" if block.cached else "free"}</div>'
    return f'<div style="{CELL}"><div style="{BOX}">{bands}</div><div>{index}</div></div>'
