"""Readings: what a computation gives for every combination of its controls, and the bars that show it.

    readings = Readings("Memory", {"context": [1024, 4096]}, lambda context: Reading({"KV": {"KV": context / 8}}, "…"))
    readings.index({"context": 4096})   # the number of a combination
    readings.bars(1)                    # its bars: plain data, which bars.py and widget.js draw

All combinations share one axis, so that a bar that is twice as long always means twice as much.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from matplotlib.ticker import MaxNLocator

from nanovllm.utils.checks import check_float, check_str, unknown_setting_error

MAX_COMBINATIONS = 4000  # each is computed before the picture is there
BEYOND = 1.2  # the axis ends at most so many times as far as the largest limit


class Reading(NamedTuple):
    """What there is to see for one combination.

    Args:
        bars: row label -> {segment label -> value of at least 0}.
        sentence: says it in words, with the numbers.
    """

    bars: Mapping[str, Mapping[str, float]]
    sentence: str


class Segment(NamedTuple):
    """A part of a bar. Where it begins and ends is given in shares of the axis, 0 to 1."""

    label: str
    start: float
    end: float
    number: str


class Bar(NamedTuple):
    """A row, with its total. `over` is empty unless it goes on beyond the axis: then "3 × H100", say."""

    label: str
    segments: tuple[Segment, ...]
    number: str
    over: str

    @property
    def text(self) -> str:
        """What stands at its end."""
        return f"▸ {self.number} = {self.over}" if self.over else self.number


class Readings:
    """Every combination's reading, checked, on one axis. The arguments are those of `Explorer`."""

    def __init__(
        self,
        title: str,
        controls: Mapping[str, Sequence[Any]],
        compute: Callable[..., Reading],
        unit: str = "",
        limits: Mapping[str, float] | None = None,
        log: bool = False,
    ) -> None:
        self.title, self.unit, self.log = check_str("title", title), unit, log
        self.controls = {name: checked_values(name, values) for name, values in controls.items()}
        ascending = sorted((limits or {}).items(), key=lambda item: item[1])
        self.limits = {name: check_float(f"limit {name!r}", limit, open_below=True) for name, limit in ascending}
        num_combinations = math.prod(map(len, self.controls.values()))
        if not self.controls:
            raise ValueError("there are no controls, so nothing to choose")
        if num_combinations > MAX_COMBINATIONS:
            raise ValueError(f"{num_combinations:,} combinations; at most {MAX_COMBINATIONS:,} are computed")
        self.combinations = [dict(zip(self.controls, values)) for values in product(*self.controls.values())]
        self._readings = [compute(**choice) for choice in self.combinations]
        self.rows: dict[str, tuple[str, ...]] = {}  # row label -> segment labels, the same in every combination
        for choice, reading in zip(self.combinations, self._readings):
            self._check(reading, f"compute({', '.join(f'{name}={value!r}' for name, value in choice.items())})")
        self.segments = list(dict.fromkeys(label for labels in self.rows.values() for label in labels))
        self._set_axis()

    def __len__(self) -> int:
        return len(self.combinations)

    def __getitem__(self, index: int) -> Reading:
        return self._readings[index]

    def index(self, choice: Mapping[str, Any]) -> int:
        """The number of a combination. A control that is not named has its first value."""
        for name, value in choice.items():
            if name not in self.controls:
                raise unknown_setting_error("Explorer", name, self.controls)
            if value not in self.controls[name]:
                raise ValueError(f"{name} is one of {', '.join(map(repr, self.controls[name]))}, not {value!r}")
        return self.combinations.index({name: choice.get(name, values[0]) for name, values in self.controls.items()})

    def choice(self, index: int) -> str:
        """The combination in words."""
        return ", ".join(f"{words(name)} {value_text(value)}" for name, value in self.combinations[index].items())

    def bars(self, index: int) -> list[Bar]:
        """The bars of a combination."""
        bars = []
        for label, values in self[index].bars.items():
            total, segments = 0.0, []
            for segment, value in values.items():
                segments.append(Segment(segment, self.share(total), self.share(total + value), number(value)))
                total += value
            over = ""
            if total > self.end * (1 + 1e-9):
                name, limit = list(self.limits.items())[-1]
                over = f"{times(total / limit)} × {name}"
            bars.append(Bar(label, tuple(segments), number(total), over))
        return bars

    def share(self, value: float) -> float:
        """Where a value stands on the axis: 0 at its start, 1 at its end and beyond."""
        if self.log:
            share = math.log(max(value, self.start) / self.start) / math.log(self.end / self.start)
        else:
            share = value / self.end
        return min(share, 1.0)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """The numbers below the axis, each with its share."""
        if self.log:
            first, last = round(math.log10(self.start)), math.floor(math.log10(self.end) + 1e-9)
            every = -(-(last - first) // 6) or 1
            values = [10.0**k for k in range(first, last + 1, every)]
        else:
            values = [v for v in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(0, self.end) if 0 <= v <= self.end]
        return [(self.share(value), f"{value:,.10g}") for value in values]

    @property
    def room(self) -> int:
        """How many characters the longest number at the end of a bar has."""
        return max(len(bar.text) for i in range(len(self)) for bar in self.bars(i))

    @property
    def has_legend(self) -> bool:
        """Whether the segments have names that are not the rows' own."""
        return any(labels != (row,) for row, labels in self.rows.items())

    def digest(self) -> str:
        """A fingerprint of all combinations, as they are shown."""
        digest = hashlib.sha256(repr((self.title, self.unit, self.limits, self.log)).encode())
        for i, choice in enumerate(self.combinations):
            shown = [(bar.label, bar.text, [(s.label, s.number) for s in bar.segments]) for bar in self.bars(i)]
            digest.update(repr((choice, shown, self[i].sentence)).encode())
        return digest.hexdigest()[:12]

    def _check(self, reading: Reading, call: str) -> None:
        if not isinstance(reading, Reading):
            raise TypeError(f"{call} must return a Reading, not {type(reading).__name__}")
        check_str(f"{call}: the sentence", reading.sentence)
        for row, values in reading.bars.items():
            for segment, value in values.items():
                check_float(f"{call}: {row!r}, {segment!r}", value)
        rows = {row: tuple(values) for row, values in reading.bars.items()}
        self.rows = self.rows or rows
        if rows != self.rows:
            advice = "the bars and their segments are the same in every combination; give 0 for what is not there"
            raise ValueError(f"{call} has {rows}, the first combination {self.rows}: {advice}")
        if not rows:
            raise ValueError(f"{call} has no bars")
        if self.log and any(len(labels) > 1 for labels in rows.values()):
            raise ValueError("on a logarithmic axis the parts of a bar cannot be compared; give each a row of its own")

    def _set_axis(self) -> None:
        totals = [sum(values.values()) for reading in self._readings for values in reading.bars.values()]
        largest, limit = max(totals), max(self.limits.values(), default=0.0)
        self.end = max(min(largest, BEYOND * limit), 1.03 * limit) if limit and not self.log else max(largest, limit)
        self.end = self.end or 1.0
        least = min((v for v in [*totals, *self.limits.values()] if v > 0), default=1.0)
        self.start = 10.0 ** math.floor(math.log10(least)) if self.log else 0.0
        if self.log and self.end <= self.start:
            self.end = 10 * self.start


def checked_values(name: str, values: Sequence[Any]) -> tuple[Any, ...]:
    """The values of a control: numbers, which become a slider, or strings, which become a menu."""
    is_right = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in values]
    if not values or not (all(is_right) or all(isinstance(v, str) for v in values)):
        raise TypeError(f"control {name!r}: give a list of numbers or a list of strings, not {values!r}")
    if len(set(values)) < len(values):
        raise ValueError(f"control {name!r} has a value twice: {values!r}")
    return tuple(values)


def words(name: str) -> str:
    """A control's name as it is shown: `compute` takes it as a keyword, which has no spaces."""
    return name.replace("_", " ")


def value_text(value: Any) -> str:
    """A control's value as it is shown."""
    return value if isinstance(value, str) else f"{value:,}"


def number(value: float) -> str:
    """A value as it is shown: whole numbers exactly, others with three significant digits."""
    if value == round(value):
        return f"{value:,.0f}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def times(ratio: float) -> str:
    return f"{ratio:,.1f}" if ratio < 10 else f"{ratio:,.0f}"
