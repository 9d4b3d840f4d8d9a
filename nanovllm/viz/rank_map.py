"""The rank map: every tensor of a model, and which rank holds which slice of it."""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from nanovllm.viz.live import Picture
from nanovllm.viz.slices import ALL, WIDTH, Box, Choice, Slices
from nanovllm.viz.theme import EMPTY, HATCHES, INK, MUTED, QUIET, ink_on, new_figure, styled

TITLE = "Which rank holds which slice?"
POINTS = 100  # of a picture's layout are an inch
PALE = 0.18


class RankMap(Picture):
    """What the ranks of an engine hold, to look at part by part: in the browser, with no kernel.

    Where nothing can be chosen, it is a PNG, and a text; both show the choice that the live picture shows first.

        RankMap({"three ranks": llm.engine.model_runner.describe()}, part="layer 0")

    Args:
        runs: label -> what `ModelRunner.describe` returned: a dict for each rank.
        choice: what to begin with: `run`, a label; `part`, "layer 0" say; `rank`, "all" or a number as a string.
    """

    def __init__(self, runs: Mapping[str, Sequence[Mapping[str, Any]]], **choice: str) -> None:
        self.slices = Slices(runs)
        super().__init__(view="RankMap", index=self.slices.index(**choice), data=pack_slices(self.slices))

    @property
    def choice(self) -> Choice:
        """What is shown first."""
        return self.slices.choices[self.index]

    def text(self) -> str:
        return rank_map_text(self.slices, self.choice)

    def figure(self) -> Figure:
        return rank_map_figure(self.slices, self.choice)

    def alt(self) -> str:
        return rank_map_alt(self.slices, self.choice)


def rank_map_text(slices: Slices, choice: Choice) -> str:
    """A line for each tensor, a column for each rank, the sentence, and a digest of all parts of all runs."""
    ranks = range(slices.num_ranks[choice.run])
    table = [["tensor", "shape", *(f"rank {rank}" for rank in ranks)]]
    for tensor in slices.tensors(choice):
        table.append([tensor.short_name, str(list(tensor.shape)), *(tensor.words(rank) for rank in ranks)])
    if any(slices.caches[choice.run]):
        table.append(["KV cache", "", *("×".join(map(str, shape)) for shape in slices.caches[choice.run])])
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in table]
    head = f"{TITLE} {choice.run}, {choice.part}, rank {choice.rank}"
    return "\n".join([head, "", *lines, "", slices.sentence(choice), f"digest {slices.digest()}"])


def rank_map_alt(slices: Slices, choice: Choice) -> str:
    return f"{TITLE} {choice.run}, {choice.part}, rank {choice.rank}. {slices.sentence(choice)}"


def look(rank: int) -> tuple[str, str]:
    """A rank's colour and hatching: not those of a request."""
    return MUTED[rank % len(MUTED)], HATCHES[rank % len(HATCHES)]


def label_of(ranks: Sequence[int]) -> str:
    """What is written on a slice."""
    return " ".join(map(str, ranks))


def rank_map_figure(slices: Slices, choice: Choice) -> Figure:
    """The tensors as boxes; of one rank, the others' slices are pale."""
    boxes, height = slices.scene(choice)
    figure = new_figure(9, height / POINTS + 0.7)
    with styled():
        ax = figure.subplots()
        figure.suptitle(f"{TITLE}\n{choice.run}, {choice.part}, rank {choice.rank}", x=0.008, ha="left", fontsize=10.5)
        for box in boxes:
            draw_box(ax, box, choice.rank)
        ax.set(xlim=(-2, WIDTH + 2), ylim=(height, 0), aspect="equal")
        ax.axis("off")
        handles = [
            Patch(facecolor=colour, hatch=hatching, edgecolor="white", linewidth=0, label=f"rank {rank}")
            for rank, (colour, hatching) in enumerate(map(look, range(slices.num_ranks[choice.run])))
        ]
        handles.append(Patch(facecolor=EMPTY, edgecolor=QUIET, label="a copy on each rank named"))
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=9)
    return figure


def draw_box(ax: Axes, box: Box, chosen: str) -> None:
    """A tensor: its name and shape above, a rectangle for each slice; pale, if it is not of the chosen rank."""
    shape = f"{box.shape}{', drawn wider' if box.stretched else ''}"
    ax.text(box.left, box.top - 18, box.name, fontsize=9, fontweight="bold", va="center", parse_math=False)
    ax.text(box.left, box.top - 6, shape, fontsize=7.5, va="center", color=QUIET, parse_math=False)
    for region in box.regions:
        place = (box.left + region.left * box.width, box.top + region.top * box.height)
        wide, high = (region.right - region.left) * box.width, (region.bottom - region.top) * box.height
        is_pale = chosen != ALL and int(chosen) not in region.ranks
        if len(region.ranks) == 1:
            colour, hatching = look(region.ranks[0])
            style: dict[str, Any] = dict(facecolor=colour, hatch=hatching, edgecolor="white", linewidth=0.8)
        else:
            colour, style = EMPTY, dict(facecolor=EMPTY, edgecolor=QUIET, linewidth=0.8)
        ax.add_patch(Rectangle(place, wide, high, alpha=PALE if is_pale else None, **style))
        if not is_pale:
            plate = dict(boxstyle=f"round,pad={0.12 if high > 14 else 0.02}", facecolor=colour, edgecolor="none")
            ink = INK if len(region.ranks) > 1 else ink_on(colour)
            middle = (place[0] + wide / 2, place[1] + high / 2)
            words: dict[str, Any] = dict(ha="center", va="center_baseline", fontsize=8 if high > 14 else 6, bbox=plate)
            ax.text(*middle, label_of(region.ranks), color=ink, **words)


def pack_slices(slices: Slices) -> bytes:
    """All choices as they are drawn, as JSON compressed by zlib. Layers that look the same share a scene."""
    scenes: dict[str, int] = {}
    combinations = []
    for choice in slices.choices:
        boxes, height = slices.scene(choice)
        scene = scenes.setdefault(json.dumps([boxes, height]), len(scenes))
        said = {"sentence": slices.sentence(choice), "alt": rank_map_alt(slices, choice)}
        combinations.append(said | {"scene": scene, "rank": None if choice.rank == ALL else int(choice.rank)})
    data = {
        "title": TITLE,
        "controls": [{"name": name, "values": values, "slides": False} for name, values in slices.controls.items()],
        "combinations": combinations,
        "scenes": [json.loads(scene) for scene in scenes],
        "width": WIDTH,
        "ranks": [
            {"look": (look(rank)[0], ink_on(look(rank)[0])), "hatch": HATCHES.index(look(rank)[1])}
            for rank in range(max(slices.num_ranks.values()))
        ],
    }
    return zlib.compress(json.dumps(data, separators=(",", ":")).encode(), level=6)
