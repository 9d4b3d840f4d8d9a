"""How a chapter shows code and figures."""

import inspect
import textwrap
from pathlib import Path
from typing import Any

from IPython.display import display
from matplotlib.figure import Figure

from nanovllm.viz.theme import picture_bundle

ROOT = Path(__file__).resolve().parent.parent.parent


class Source:
    """A function's or class's source: highlighted where markdown is, and the same text for a test to compare."""

    def __init__(self, obj: Any) -> None:
        file = Path(inspect.getfile(obj)).resolve()
        self.place = f"{file.relative_to(ROOT).as_posix()}: {obj.__qualname__}"
        self.code = textwrap.dedent(inspect.getsource(obj)).rstrip()

    def __repr__(self) -> str:
        return f"`{self.place}`\n\n```python\n{self.code}\n```"

    def _repr_markdown_(self) -> str:
        return repr(self)


def source(obj: Any) -> Source:
    """Show the package's own code of a function, method or class."""
    return Source(obj)


def show(picture: Any, look_for: str, alt: str = "") -> None:
    """Show a figure or one of our pictures with a caption.

    Args:
        picture: a matplotlib figure, or a picture that has its own text, such as a `CacheMap`.
        look_for: what is worth seeing, to follow the words "Look for".
        alt: for a figure, what is seen in it, numbers included. A test run compares it.
    """
    data, metadata = picture_bundle(picture, alt, alt) if isinstance(picture, Figure) else picture._repr_mimebundle_()
    display(data, metadata=metadata, raw=True)
    caption = f"*Look for {look_for}*"
    display({"text/markdown": caption, "text/plain": caption}, raw=True)
