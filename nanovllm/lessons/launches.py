"""Launches and kernels on one clock: read from PyTorch's profiler, drawn to scale."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nanovllm.viz.theme import EMPTY, INK, QUIET, new_figure, styled

LAUNCH, KERNEL = "#E69F00", "#0072B2"
EDGED = 0.004  # of the axis: what is wider has white edges
NARROWEST = 0.0015  # of the axis: what is shorter is drawn so wide, or it would not be seen
LONELY = 0.003  # the same, in a lane with a few events only
WIDENED = 0.1  # of the axis: what all events of a lane may gain by that together

# What a driver is called for when something is put into a GPU's queue, and what runs there.
RUNTIME = {"cuda_runtime", "cuda_driver"}
PUTS_WORK = ("Launch", "MemcpyAsync", "MemsetAsync")
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}


class Event(NamedTuple):
    """Something that took its time; seconds."""

    name: str
    start: float
    seconds: float

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(slots=True)
class Launches:
    """One piece of work: what Python put into the queue, and what the device did, each in the order of time."""

    launches: list[Event]
    kernels: list[Event]

    def from_zero(self) -> "Launches":
        """The same, counted from the beginning of the first launch."""
        zero = min((event.start for event in self.launches), default=0.0)
        return Launches(
            *([Event(e.name, e.start - zero, e.seconds) for e in events] for events in (self.launches, self.kernels))
        )

    @property
    def seconds(self) -> float:
        """From the first launch to the end of the last kernel."""
        return max((event.end for event in (*self.launches, *self.kernels)), default=0.0)

    @property
    def busy(self) -> float:
        """The share of that time in which the device computes."""
        return self.computing / self.seconds if self.kernels else 0.0

    @property
    def computing(self) -> float:
        """Seconds of all kernels together."""
        return sum(event.seconds for event in self.kernels)

    def to_dict(self) -> dict[str, Any]:
        """Numbers for a file: names by number, microseconds to a tenth."""
        names = sorted({event.name for event in (*self.launches, *self.kernels)})
        place = {name: i for i, name in enumerate(names)}
        lists = {
            kind: [[place[e.name], round(1e6 * e.start, 1), round(1e6 * e.seconds, 1)] for e in events]
            for kind, events in (("launches", self.launches), ("kernels", self.kernels))
        }
        return {"names": names, **lists}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Launches":
        names = data["names"]
        return cls(
            *(
                [Event(names[i], start / 1e6, micros / 1e6) for i, start, micros in data[kind]]
                for kind in ("launches", "kernels")
            )
        )


def from_profiler(events: Iterable[Mapping[str, Any]]) -> Launches:
    """Out of the events of a trace that `torch.profiler` has exported (`"traceEvents"`), those that concern a GPU."""
    launches, kernels = [], []
    for event in events:
        if "dur" not in event:
            continue
        kind = str(event.get("cat", "")).lower()
        timed = Event(short(event["name"]), float(event["ts"]) / 1e6, float(event["dur"]) / 1e6)
        if kind in RUNTIME and any(part in timed.name for part in PUTS_WORK):
            launches.append(timed)
        elif kind in ON_GPU:
            kernels.append(timed)
    for found in (launches, kernels):
        found.sort(key=lambda event: event.start)
    return Launches(launches, kernels).from_zero()


def short(name: str) -> str:
    """A kernel's name without its C++ templates and arguments."""
    return name.removeprefix("void ").split("<")[0].split("(")[0].strip()[:60]


# -- As a picture ------------------------------------------------------------------------------------------------------


def launches_of(run: Launches) -> str:
    """How many, in words."""
    number = len(run.launches)
    return f"{number} launch{'es' * (number != 1)}"


def told(run: Launches) -> str:
    """A run in words."""
    return f"{launches_of(run)}, {1e3 * run.seconds:.3g} ms, busy {run.busy:.0%}"


def draw_launches(runs: Mapping[str, Launches], device: str = "GPU", words: Callable[[Launches], str] = told) -> Figure:
    """Two lanes for each run, launches above and what the device does below, all on one scale of time.

    `words` are said of a run in its title.
    """
    longest = max(run.seconds for run in runs.values())
    factor = 1e3  # milliseconds
    figure = new_figure(9, 1.25 * len(runs) + 0.6)
    with styled():
        axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (title, run) in zip(axes, runs.items()):
            draw_lane(ax, 1, run.launches, LAUNCH, factor, longest)
            draw_lane(ax, 0, run.kernels, KERNEL, factor, longest)
            ax.axvline(factor * run.seconds, color=INK, linewidth=1, linestyle=":")
            ax.set_xlim(-0.012 * factor * longest, 1.01 * factor * longest)
            ax.set_ylim(-0.5, 1.5)
            ax.set_yticks([1, 0], ["Python launches", f"{device} computes"], fontsize=9)
            ax.tick_params(axis="y", length=0)
            ax.set_title(f"{title}: {words(run)}", fontsize=10)
        axes[-1].set_xlabel("milliseconds since the first launch")
    return figure


def draw_lane(ax: Axes, row: int, events: list[Event], colour: str, factor: float, longest: float) -> None:
    """A box for each event, as wide as it is long; the ground shows where nothing happens."""
    end = factor * longest
    narrowest = end * (LONELY if len(events) < 10 else min(NARROWEST, WIDENED / len(events)))
    ax.add_patch(Rectangle((0, row - 0.33), end, 0.66, facecolor=EMPTY, edgecolor="none"))
    for narrow in (True, False):
        boxes = [
            Rectangle((factor * e.start, row - 0.33), max(factor * e.seconds, narrowest), 0.66)
            for e in events
            if (e.seconds < EDGED * longest) == narrow
        ]
        edge = "none" if narrow else "white"  # white edges would leave nothing of a narrow box
        # Not snapped to pixels: of boxes that are thinner than one, each shall be seen a little, and none vanish.
        collection = PatchCollection(boxes, facecolor=colour, edgecolor=edge, linewidth=0.4, snap=False)
        ax.add_collection(collection)
    ax.axhline(row - 0.33, color=QUIET, linewidth=0.6)
