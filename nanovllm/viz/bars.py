"""Readings drawn as characters, as a static figure, and said in words.

bars_text(readings, index)     # for a terminal, and for the test run, which compares it
bars_figure(readings, index)   # for a saved notebook, for GitHub and for print
bars_alt(readings, index)      # for those who do not see it
"""

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from nanovllm.viz.readings import Bar, Readings, number
from nanovllm.viz.theme import EMPTY, INK, QUIET, colour, ink_on, is_letter, looks, new_figure, styled

MARKS = "#=+o~x%-"  # the characters of segments that are no requests
WIDTH = 48  # characters for the whole axis
LETTER = 0.014  # share of the axis that a letter needs, on the narrowest page
BAR = 0.62  # the height of a bar; from one to the next is 1


def limit_lanes(readings: Readings) -> list[tuple[float, str, int]]:
    """The limits from right to left: share, words, and how many lines above the bars, so that nothing collides.

    The words stand to the right of a line that goes up to them. So they stand above all lines that they would cross.
    """
    placed: list[tuple[float, str, int]] = []
    for name, limit in reversed(readings.limits.items()):
        share, words = readings.share(limit), f"{name} {number(limit)}"
        end = share + LETTER * (len(words) + 1)
        placed.append((share, words, 1 + max((lane for other, _, lane in placed if other < end), default=-1)))
    return placed


# -- As characters -----------------------------------------------------------------------------------------------------


def bars_text(readings: Readings, index: int) -> str:
    """The choice, a line a bar, the axis, the sentence, and a digest of every combination."""
    bars = readings.bars(index)
    things = [label for label in readings.segments if not is_letter(label)]
    marks = {
        label: label if is_letter(label) else MARKS[things.index(label) % len(MARKS)] for label in readings.segments
    }
    width = max(map(len, readings.rows))
    unit = f" {readings.unit}" if readings.unit else ""
    lines = [readings.title, readings.choice(index), ""]
    ground = [" "] * WIDTH
    for limit in readings.limits.values():
        ground[round(readings.share(limit) * (WIDTH - 1))] = ":"
    for bar in bars:
        drawn = "".join(marks[s.label] * (round(WIDTH * s.end) - round(WIDTH * s.start)) for s in bar.segments)
        parts = "  (" + ", ".join(f"{s.label} {s.number}" for s in bar.segments) + ")" if len(bar.segments) > 1 else ""
        axis = drawn + "".join(ground[len(drawn) :]) + (">" if bar.over else "|")
        lines.append(f"{bar.label:<{width}}  |{axis}  {bar.text.removeprefix('▸ ')}{parts}")
    scale = "logarithmic, " if readings.log else ""
    lines.append(f"axis: {scale}{readings.ticks[0][1]} to {number(readings.end)}{unit}")
    if readings.limits:
        lines[-1] += "; ':' " + ", ".join(f"{name} {number(limit)}{unit}" for name, limit in readings.limits.items())
    if readings.has_legend:
        lines.append(", ".join(f"{mark} {label}" for label, mark in marks.items() if mark != label))
    return "\n".join([*lines, "", readings[index].sentence, f"digest {readings.digest()}"])


# -- As a figure -------------------------------------------------------------------------------------------------------


def bars_figure(readings: Readings, index: int) -> Figure:
    """Title and choice, the bars with their numbers, the axis with its limits, and the sentence below."""
    bars, limits = readings.bars(index), limit_lanes(readings)
    num_lanes = 1 + max((lane for _, _, lane in limits), default=-1)
    sentence = textwrap.wrap(readings[index].sentence, 115)
    height = 0.36 * len(bars) + 0.2 * num_lanes
    figure = new_figure(9, height + 0.19 * len(sentence) + (1.35 if readings.has_legend else 1.05))
    with styled():
        ax = figure.subplots()
        title = f"{readings.title}\n{readings.choice(index)}"
        figure.suptitle(title, x=0.008, ha="left", fontsize=10.5, parse_math=False)
        for row, bar in enumerate(bars):
            draw_bar(ax, readings, row, bar)
        draw_axis(ax, readings, limits, len(bars))
        figure.supxlabel("\n".join(sentence), x=0.008, ha="left", fontsize=9.5, parse_math=False)
    return figure


def draw_bar(ax: Axes, readings: Readings, row: int, bar: Bar) -> None:
    """The segments, each with its number if there is room; the total stands at the end."""
    look = looks(readings.segments)
    ax.add_patch(Rectangle((0, row - BAR / 2), 1, BAR, facecolor=EMPTY, edgecolor="none"))
    for segment in bar.segments:
        background, hatching = look[segment.label]
        width = segment.end - segment.start
        style: dict[str, Any] = dict(facecolor=background, edgecolor="white", hatch=hatching, linewidth=0)
        ax.add_patch(Rectangle((segment.start, row - BAR / 2), width, BAR, **style))
        if segment.number != bar.number and width > LETTER * (len(segment.number) + 1):
            box = dict(boxstyle="round,pad=0.15", facecolor=background, edgecolor="none")
            middle = segment.start + width / 2
            words: dict[str, Any] = dict(ha="center", va="center_baseline", fontsize=8, bbox=box)
            ax.text(middle, row, segment.number, color=ink_on(background), **words)
    end = bar.segments[-1].end if bar.segments else 0.0
    ground = dict(boxstyle="round,pad=0.1", facecolor="white" if end > 0.99 else EMPTY, edgecolor="none")
    ax.text(end + 0.012, row, bar.text, va="center_baseline", fontsize=9, fontweight="bold", bbox=ground, zorder=4)


def draw_axis(ax: Axes, readings: Readings, limits: list[tuple[float, str, int]], num_bars: int) -> None:
    """Ticks below, the names of the limits above, and the legend."""
    top = -0.55
    for share, words, lane in limits:
        high = top - 0.1 - 0.55 * lane
        ax.vlines(share, high - 0.3, num_bars - 0.45, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=3)
        ax.text(share + 0.006, high - 0.08, words, fontsize=8.5, va="center_baseline")
    num_lanes = 1 + max((lane for _, _, lane in limits), default=-1)
    ax.set_xlim(0, 1.02 + LETTER * readings.room)
    ax.set_ylim(num_bars - 0.45, top - 0.55 * num_lanes)
    ax.set_xticks([share for share, _ in readings.ticks], [text for _, text in readings.ticks], fontsize=8.5)
    ax.spines["bottom"].set_bounds(0, 1)
    ax.spines["left"].set_bounds(num_bars - 0.45, top)
    ax.set_xlabel(readings.unit + (" (logarithmic)" if readings.log else ""), fontsize=8.5, x=0.5 / ax.get_xlim()[1])
    ax.set_yticks(range(num_bars), list(readings.rows), fontsize=9.5)
    ax.tick_params(axis="y", length=0)
    for label in ax.get_yticklabels():
        if is_letter(label.get_text()):
            background = colour(label.get_text())
            box = dict(boxstyle="round,pad=0.2", facecolor=background, edgecolor="none")
            label.set(color=ink_on(background), fontweight="bold", bbox=box)
    if readings.has_legend:
        items = looks(readings.segments).items()
        handles = [Patch(facecolor=c, hatch=h, edgecolor="white", linewidth=0, label=label) for label, (c, h) in items]
        ax.figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=9)  # type: ignore


# -- In words ----------------------------------------------------------------------------------------------------------


def bars_alt(readings: Readings, index: int) -> str:
    """Title, choice, every number, and the sentence."""
    unit = f" {readings.unit}" if readings.unit else ""
    said = []
    for bar in readings.bars(index):
        parts = " + ".join(f"{s.label} {s.number}" for s in bar.segments) if len(bar.segments) > 1 else ""
        more = "; ".join(filter(None, [parts, bar.over]))
        said.append(f"{bar.label}: {bar.number}{unit}" + (f" ({more})" if more else ""))
    return f"{readings.title} {readings.choice(index)}. {'; '.join(said)}. {readings[index].sentence}"
