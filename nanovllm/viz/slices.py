"""Which rank holds which slice: what the ranks say of themselves, as plain data, in words, and laid out to be drawn.

slices = Slices({"three ranks": llm.engine.model_runner.describe()})
slices.choices                  # every run, part of the model and rank to choose from
slices.sentence(slices.choices[0])
slices.scene(slices.choices[0])      # its tensors as boxes, which rank_map.py and widget.js draw
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

ALL = "all"
ENDS = "embedding and head"
WIDTH, TALLEST = 880.0, 300.0  # of a picture, in points
GAP, LABEL, THINNEST = 22.0, 32.0, 12.0
NARROW, WIDENED = 60.0, 170.0  # a box that would be narrower than the first becomes as wide as the second


class Choice(NamedTuple):
    """What is looked at: a run, a part of its model, and one rank or all."""

    run: str
    part: str
    rank: str


class Region(NamedTuple):
    """A rectangle of a tensor, in shares of its sides, and the ranks that hold it."""

    left: float
    top: float
    right: float
    bottom: float
    ranks: tuple[int, ...]


class Box(NamedTuple):
    """A tensor as it is drawn, in points. `stretched`: it is wider than its shape says."""

    name: str
    shape: str
    left: float
    top: float
    width: float
    height: float
    stretched: bool
    regions: tuple[Region, ...]


class Tensor(NamedTuple):
    """A checkpoint's tensor. `parts` has for each rank where its part starts and stops in each dimension."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def short_name(self) -> str:
        return self.name.removesuffix(".weight").rsplit(".", 1)[-1]

    @property
    def is_copied(self) -> bool:
        """Whether every rank holds all of it."""
        return all(size(part) == math.prod(self.shape) for part in self.parts)

    def owners(self) -> dict[tuple[tuple[int, int], ...], tuple[int, ...]]:
        """Each different part, and the ranks that hold it."""
        owners: dict[tuple[tuple[int, int], ...], tuple[int, ...]] = {}
        for rank, part in enumerate(self.parts):
            owners[part] = (*owners.get(part, ()), rank)
        return owners

    def words(self, rank: int) -> str:
        """What a rank holds of it."""
        cut = [
            f"{axis} {start:,} to {stop - 1:,}"
            for axis, size, (start, stop) in zip(("rows", "columns"), self.shape, self.parts[rank])
            if stop - start < size
        ]
        return ", ".join(cut) or "all"


class Slices:
    """Runs of an engine on one or more ranks, as `ModelRunner.describe` tells of them."""

    def __init__(self, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        if not runs:
            raise ValueError("there are no runs to show")
        self.runs = {label: parts_of(label, ranks) for label, ranks in runs.items()}
        self.caches = {label: [tuple(rank["kv_cache"]) for rank in ranks] for label, ranks in runs.items()}
        self.parts = list(dict.fromkeys(part for parts in self.runs.values() for part in parts))
        self.num_ranks = {label: len(ranks) for label, ranks in runs.items()}
        ranks = [ALL, *(str(rank) for rank in range(max(self.num_ranks.values())))]
        self.controls = {"run": list(runs), "part": self.parts, "rank": ranks}
        self.choices = [Choice(*values) for values in product(*self.controls.values())]

    def index(self, **choice: str) -> int:
        """The number of a choice. What is not named has its first value."""
        for name, value in choice.items():
            if value not in self.controls.get(name, []):
                known = self.controls.get(name)
                raise ValueError(f"{name} is one of {known}, not {value!r}" if known else f"there is no {name!r}")
        return self.choices.index(Choice(*(choice.get(name, values[0]) for name, values in self.controls.items())))

    def tensors(self, choice: Choice) -> list[Tensor]:
        return self.runs[choice.run].get(choice.part, [])

    # -- In words ------------------------------------------------------------------------------------------------------

    def sentence(self, choice: Choice) -> str:
        """What the ranks hold of a part of the model, or one of them."""
        tensors, num_ranks = self.tensors(choice), self.num_ranks[choice.run]
        if not tensors:
            return f"The model of this run has no {choice.part}."
        if choice.rank != ALL:
            return self._sentence_of_rank(choice, tensors)
        copied = [tensor.short_name for tensor in tensors if tensor.is_copied]
        split = len(tensors) - len(copied)
        if num_ranks == 1:
            return f"One rank holds all of it: {numbers(tensors, 0):,} numbers."
        held = [numbers(tensors, rank) for rank in range(num_ranks)]
        whole = sum(math.prod(tensor.shape) for tensor in tensors)
        each = f"{held[0]:,}" if len(set(held)) == 1 else ", ".join(f"{n:,}" for n in held)
        said = f"{tensor_count(split)} split, {len(copied)} copied to every rank. "
        for sharing in sorted({len(ranks) for t in tensors for ranks in t.owners().values()} - {1, num_ranks}):
            shared = [t.short_name for t in tensors if any(len(ranks) == sharing for ranks in t.owners().values())]
            said += f"A slice of {joined(shared)} lies on {sharing} ranks. "
        return said + f"Each of {num_ranks} ranks holds {each} of {whole:,} numbers ({held[0] / whole:.1%})."

    def _sentence_of_rank(self, choice: Choice, tensors: list[Tensor]) -> str:
        rank = int(choice.rank)
        if rank >= self.num_ranks[choice.run]:
            return f"This run has no rank {rank}."
        by_words: dict[str, list[str]] = {}
        for tensor in tensors:
            by_words.setdefault(tensor.words(rank), []).append(tensor.short_name)
        held = "; ".join(f"{words} of {joined(names)}" for words, names in by_words.items())
        everything = [tensor for part in self.runs[choice.run].values() for tensor in part]
        whole = sum(math.prod(tensor.shape) for tensor in everything)
        shape = " × ".join(f"{n:,}" for n in self.caches[choice.run][rank])
        return (
            f"Rank {rank} holds {held}. In the whole model: {numbers(everything, rank):,} of {whole:,} numbers, "
            f"and a KV cache of {shape}."
        )

    def digest(self) -> str:
        """A fingerprint of every part of every run."""
        shown = [(label, list(parts.items()), self.caches[label]) for label, parts in self.runs.items()]
        return hashlib.sha256(repr(shown).encode()).hexdigest()[:12]

    # -- Laid out ------------------------------------------------------------------------------------------------------

    def scene(self, choice: Choice) -> tuple[list[Box], float]:
        """The tensors of a part of a model as boxes, to scale where that can be seen, and the height of it all."""
        tensors = self.tensors(choice)
        columns: list[list[Tensor]] = []
        tallest = max((rows(tensor) for tensor in tensors), default=1)
        for tensor in tensors:  # below the one before if it fits there: wide below narrow would waste a column
            column = columns[-1] if columns else []
            fits = column and sum(map(rows, column)) + rows(tensor) < tallest and width(tensor) <= width(column[0])
            columns[-1:] = [[*column, tensor]] if fits else [*columns[-1:], [tensor]]
        room = WIDTH - GAP * (len(columns) - 1)
        scale = min(room / sum(width(column[0]) for column in columns), TALLEST / tallest) if columns else 1.0
        boxes, left, height = [], 0.0, 0.0
        for column in columns:
            top, widest = LABEL, 0.0
            for tensor in column:
                box = placed(tensor, left, top, scale)
                boxes.append(box)
                top = box.top + box.height + LABEL
                widest = max(widest, box.width)
            left += widest + GAP
            height = max(height, top - LABEL + 4)
        return boxes, height


def parts_of(label: str, ranks: Sequence[Mapping[str, Any]]) -> dict[str, list[Tensor]]:
    """The tensors of a run by the part of the model that they belong to: its layers, in order, and its two ends."""
    if [rank["rank"] for rank in ranks] != list(range(len(ranks))) or not ranks:
        raise ValueError(f"{label!r} does not describe ranks 0, 1, 2 …")
    names = [[tensor["name"] for tensor in rank["tensors"]] for rank in ranks]
    if any(other != names[0] for other in names):
        raise ValueError(f"the ranks of {label!r} describe different tensors")
    parts: dict[str, list[Tensor]] = {}
    for told in zip(*(rank["tensors"] for rank in ranks)):
        name, shape = told[0]["name"], tuple(told[0]["shape"])
        tensor = Tensor(name, shape, tuple(tuple((a, b) for a, b in tensor["part"]) for tensor in told))
        layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else None
        parts.setdefault(ENDS if layer is None else f"layer {layer}", []).append(tensor)
    for tensors in parts.values():  # what is long and thin at the end
        tensors.sort(key=lambda tensor: len(tensor.shape) < 2)
    return dict(
        sorted(parts.items(), key=lambda item: (item[0] == ENDS, int(item[0].split()[-1]) if item[0] != ENDS else 0))
    )


def placed(tensor: Tensor, left: float, top: float, scale: float, narrow: float = NARROW) -> Box:
    """A tensor as a box; one that would be narrower than `narrow` is widened."""
    wide, high = scale * width(tensor), max(scale * rows(tensor), THINNEST)
    regions = []
    for part, ranks in tensor.owners().items():
        *first, (start, stop) = part
        above, below = first[0] if first else (0, 1)
        sides = (start / width(tensor), above / rows(tensor), stop / width(tensor), below / rows(tensor))
        regions.append(Region(*sides, ranks))
    shape = " × ".join(f"{n:,}" for n in tensor.shape)
    is_narrow = wide < narrow
    return Box(tensor.short_name, shape, left, top, WIDENED if is_narrow else wide, high, is_narrow, tuple(regions))


def rows(tensor: Tensor) -> int:
    return tensor.shape[0] if len(tensor.shape) > 1 else 1


def width(tensor: Tensor) -> int:
    return tensor.shape[-1]


def size(part: Sequence[tuple[int, int]]) -> int:
    return math.prod(stop - start for start, stop in part)


def numbers(tensors: Sequence[Tensor], rank: int) -> int:
    """How many numbers a rank holds of some tensors."""
    return sum(size(tensor.parts[rank]) for tensor in tensors)


def tensor_count(n: int) -> str:
    return f"{n} tensor is" if n == 1 else f"{n} tensors are"


def joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
