"""The stepper's boxes and buttons, and the line that says what came of the last press."""

from collections.abc import Callable

import anywidget
import traitlets

from nanovllm.viz.live import STATIC


class Controls(anywidget.AnyWidget):
    """What a reader presses: `pressed(button=…, prompt=…, max_tokens=…, request=…)` is called with all there is."""

    _esm = STATIC / "controls.js"
    _css = STATIC / "widget.css"
    max_tokens = traitlets.Int().tag(sync=True)  # what "Length" begins with
    unfinished = traitlets.List(traitlets.Unicode()).tag(sync=True)  # the requests that can be aborted
    message = traitlets.Unicode().tag(sync=True)

    def __init__(self, pressed: Callable[..., None], max_tokens: int) -> None:
        super().__init__(max_tokens=max_tokens)
        self.on_msg(lambda _, content, buffers: pressed(**content))
