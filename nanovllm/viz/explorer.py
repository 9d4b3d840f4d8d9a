"""The explorer: what if? Choose a value for each control, and see what a computation gives for it."""

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from nanovllm.viz.bars import bars_alt, bars_figure, bars_text, limit_lanes
from nanovllm.viz.live import Picture
from nanovllm.viz.readings import Reading, Readings, value_text, words
from nanovllm.viz.theme import HATCHES, colour, ink_on, is_letter, looks

__all__ = ["Explorer", "Reading"]


class Explorer(Picture):
    """Bars and a sentence for every combination of some controls, to choose from: in the browser, with no kernel.

    Where nothing can be chosen, it is a PNG, and a text; both show the combination that the live picture shows first.

        Explorer(
            title="How long is the KV cache?",
            controls={"model": ["small", "large"], "context": [1024, 4096]},
            compute=lambda model, context: Reading({"KV cache": {"KV cache": …}}, "…"),
            unit="MB",
        )

    Args:
        title: the question.
        controls: name -> values. Numbers become a slider with a stop for each, strings a menu. An underscore is shown
            as a space.
        compute: is called with a value for each control, by name, once for every combination, at once. Its bars have
            the same rows and segments every time. A segment called by a letter has that request's colour.
        unit: of the values.
        limits: named values to compare with, marked on the axis. The axis ends a little behind the largest of them: a
            bar that goes on says how many times as large it is.
        start: control -> value to begin with; by default the first.
        log: whether the axis is logarithmic; then a bar has one segment.
    """

    def __init__(
        self,
        title: str,
        controls: Mapping[str, Sequence[Any]],
        compute: Callable[..., Reading],
        unit: str = "",
        limits: Mapping[str, float] | None = None,
        start: Mapping[str, Any] | None = None,
        log: bool = False,
    ) -> None:
        self.readings = Readings(title, controls, compute, unit, limits, log)
        super().__init__(view="Explorer", index=self.readings.index(start or {}), data=pack_readings(self.readings))

    @property
    def choice(self) -> dict[str, Any]:
        """The combination that is shown first."""
        return dict(self.readings.combinations[self.index])

    def at(self, **choice: Any) -> "Explorer":
        """The same picture, with these values chosen, and the others as in this one."""
        r = self.readings
        start = self.choice | choice
        r.index(start)  # a wrong choice is refused before anything is done
        return Explorer(r.title, r.controls, lambda **chosen: r[r.index(chosen)], r.unit, r.limits, start, r.log)

    def text(self) -> str:
        return bars_text(self.readings, self.index)

    def figure(self) -> Figure:
        return bars_figure(self.readings, self.index)

    def alt(self) -> str:
        return bars_alt(self.readings, self.index)


def pack_readings(readings: Readings) -> bytes:
    """All combinations as they are drawn, as JSON compressed by zlib: the browser knows no scale, it draws shares."""
    look = looks(readings.segments)
    data = {
        "title": readings.title,
        "unit": readings.unit + (" (logarithmic)" if readings.log else ""),
        "controls": [
            {"name": words(name), "values": list(map(value_text, values)), "slides": not isinstance(values[0], str)}
            for name, values in readings.controls.items()
        ],
        "rows": [{"label": row, "look": swatch(colour(row)) if is_letter(row) else None} for row in readings.rows],
        "segments": [
            {"label": label, "look": swatch(background), "hatch": HATCHES.index(hatching)}
            for label, (background, hatching) in look.items()
        ],
        "legend": readings.has_legend,
        "room": readings.room,
        "ticks": readings.ticks,
        "limits": limit_lanes(readings),
        "combinations": [
            {"sentence": readings[i].sentence, "alt": bars_alt(readings, i), "bars": readings.bars(i)}
            for i in range(len(readings))
        ],
    }
    return zlib.compress(json.dumps(data, separators=(",", ":")).encode(), level=6)


def swatch(background: str) -> tuple[str, str]:
    """A colour, and the ink that is read on it."""
    return background, ink_on(background)
