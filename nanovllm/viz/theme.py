"""One look for all pictures: a colour for each request, the same in every chapter, and never colour alone.

The colours are those of Okabe and Ito, which people with any form of colour blindness can tell apart. A letter or a
hatching always says the same as the colour.
"""

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "--", "++")
MUTED = ("#4a6d8f", "#d1b06b", "#6f9a80", "#94596e", "#a9b9c9", "#8a6a45", "#c9c29a", "#707070")  # not of requests
INK = "#222222"
QUIET = "#6b6b6b"
EMPTY = "#f2f2f2"

STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",  # not transparent: a figure must be readable on a dark page, too
    "figure.dpi": 110,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
}


def letter(index: int) -> str:
    """The name of the request that came as number `index`: A, B, … Z, A1, B1, …"""
    return chr(ord("A") + index % 26) + (str(index // 26) if index >= 26 else "")


def colour(name: str) -> str:
    """The colour of the request called `name`."""
    return COLOURS[(ord(name[0]) - ord("A")) % len(COLOURS)]


def hatch(name: str) -> str:
    """The hatching that goes with it."""
    return HATCHES[(ord(name[0]) - ord("A")) % len(HATCHES)]


def looks(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and hatching for each label: those of the request, if it is a letter; else muted ones, in order."""
    things = [label for label in labels if not is_letter(label)]
    muted = {label: (MUTED[i % len(MUTED)], HATCHES[i % len(HATCHES)]) for i, label in enumerate(things)}
    return {label: muted.get(label) or (colour(label), hatch(label)) for label in labels}


def is_letter(label: str) -> bool:
    """Whether a label is the name of a request."""
    return len(label) == 1 and "A" <= label <= "Z"


def ink_on(background: str) -> str:
    """Black or white, whichever is easier to read on a colour such as "#0072B2" (WCAG's relative luminance)."""
    red, green, blue = (int(background[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "black" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18 else "white"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in the common style, in inches. It is not pyplot's, so nothing displays it by itself."""
    with matplotlib.rc_context(STYLE):
        return Figure(figsize=(width, height), layout="constrained")


def styled() -> Any:
    """A context manager: what is drawn inside has the common style."""
    return matplotlib.rc_context(STYLE)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = BytesIO()
    with styled():
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def picture_bundle(figure: Figure, text: str, alt: str, **metadata: str) -> tuple[dict[str, str], dict[str, Any]]:
    """What Jupyter displays: the figure, and `text` for those who do not see it, and for tests to compare."""
    data = {"image/png": base64.b64encode(png(figure)).decode(), "text/plain": text}
    return data, {"image/png": {"alt": alt, **metadata}}
