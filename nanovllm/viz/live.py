"""What the live pictures have in common: one JavaScript module, three ways of being shown; of most, a trace."""

from pathlib import Path
from typing import Any

import anywidget
import traitlets
from matplotlib.figure import Figure

from nanovllm.engine.trace import Trace
from nanovllm.viz.frames import Frames
from nanovllm.viz.pack import changes, pack
from nanovllm.viz.theme import picture_bundle

STATIC = Path(__file__).parent / "static"


class Picture(anywidget.AnyWidget):
    """Live in the browser; where nothing is live, a PNG, and a text."""

    _esm = STATIC / "widget.js"
    _css = STATIC / "widget.css"
    view = traitlets.Unicode().tag(sync=True)
    data = traitlets.Bytes().tag(sync=True)
    index = traitlets.Int().tag(sync=True)  # of what a new view shows first: a frame, or a combination

    def text(self) -> str:
        """The picture as characters."""
        raise NotImplementedError

    def figure(self) -> Figure:
        """The picture as it is printed."""
        raise NotImplementedError

    def alt(self) -> str:
        """The picture in a sentence or two."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.text()

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        live, _ = super()._repr_mimebundle_(**kwargs)  # type: ignore[misc]
        data, metadata = picture_bundle(self.figure(), self.text(), self.alt(), widget=self.view)
        return live | data, metadata


class LiveView(Picture):
    """A picture of a trace that the reader can play: in the browser, with no kernel.

    Where nothing can be played, it is a PNG, and a text; both show the step that the live picture shows first.

    Args:
        trace: the run to show, or its frames. It may still be growing: see `update`.
        step: the step to begin with, counted from the end if negative. By default the one with most blocks in use.
            IndexError if there is no such step.
    """

    def __init__(self, trace: Trace | Frames, step: int | None = None) -> None:
        self.frames = trace if isinstance(trace, Frames) else Frames(trace)
        self._num_sent = len(self.frames)
        super().__init__(view=type(self).__name__, index=self.frames.index_of(step))

    def update(self) -> None:
        """Show what the trace got since, and go to its last step. Only what is new travels to the browser."""
        first = self._num_sent - 1  # the last frame may have changed: requests came after it
        self._num_sent = len(self.frames)
        self.index = self._num_sent - 1
        self.send({"at": first, "frames": [changes(self.frames, i) for i in range(first, self._num_sent)]})

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        """The whole run is packed when a new view asks for it, and at no other time."""
        state = super().get_state(key, drop_defaults)
        return state | {"data": pack(self.frames)} if "data" in state else state
