"""A snapshot: what the engine holds between two steps. It can be drawn as characters and as a figure."""

from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nanovllm.llm import LLM
from nanovllm.viz.theme import EMPTY, QUIET, colour, hatch, ink_on, letter, new_figure, picture_bundle, styled

MAX_DRAWN_BLOCKS = 64  # a pool may have thousands; the lowest ids are used first


@dataclass(frozen=True, slots=True)
class RequestState:
    """One request: how many tokens it has, how many of them the KV cache holds, and in which blocks."""

    name: str
    status: str
    num_tokens: int
    num_computed_tokens: int
    block_table: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockState:
    """One physical block: who holds it, how many of its slots are filled, and whether the prefix cache knows it."""

    owners: tuple[str, ...]
    filled: int
    cached: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The unfinished requests, running ones first, and the blocks of the pool."""

    requests: tuple[RequestState, ...]
    blocks: tuple[BlockState, ...]
    block_size: int

    @classmethod
    def of(cls, llm: LLM, names: dict[int, str] | None = None) -> "Snapshot":
        """Look at `llm` now. `names` gives requests, by id, their letters; by default the id 0 is A, 1 is B and so on."""
        names = names or {}
        scheduler, manager = llm.engine.scheduler, llm.engine.block_manager
        size = manager.block_size
        owners: list[list[str]] = [[] for _ in manager.blocks]
        filled = [size if block.hash is not None else 0 for block in manager.blocks]
        requests = []
        for seq in [*scheduler.running, *scheduler.waiting]:
            name = names.get(seq.id, letter(seq.id))
            requests.append(
                RequestState(name, seq.status.value, seq.num_tokens, seq.num_computed_tokens, tuple(seq.block_table))
            )
            for i, block in enumerate(seq.block_table):
                owners[block].append(name)
                filled[block] = max(filled[block], min(size, seq.num_computed_tokens - i * size))
        blocks = (BlockState(tuple(o), f, b.hash is not None) for o, f, b in zip(owners, filled, manager.blocks))
        return cls(tuple(requests), tuple(blocks), size)

    @property
    def num_used_blocks(self) -> int:
        return sum(bool(block.owners) for block in self.blocks)

    @property
    def sentence(self) -> str:
        """The whole in one line."""
        running = sum(request.status == "running" for request in self.requests)
        return (
            f"{running} running, {len(self.requests) - running} waiting, "
            f"{self.num_used_blocks} of {len(self.blocks)} blocks in use"
        )

    @property
    def alt(self) -> str:
        """The blocks in words."""
        drawn = self.blocks[:MAX_DRAWN_BLOCKS]
        used = [f"block {i} belongs to {' and '.join(b.owners)}" for i, b in enumerate(drawn) if b.owners]
        return f"The KV cache as a row of blocks: {self.sentence}" + "".join(f"; {words}" for words in used) + "."

    def __str__(self) -> str:
        lines = [self.sentence]
        if self.requests:
            lines.append("request  status   tokens  computed  block table")
        for r in self.requests:
            table = list(r.block_table)
            lines.append(f"{r.name:<7}  {r.status:<7}  {r.num_tokens:>6}  {r.num_computed_tokens:>8}  {table}")
        for i, block in enumerate(self.blocks[:MAX_DRAWN_BLOCKS]):
            if not block.owners:
                words = "free, content kept" if block.cached else "free"
            else:
                words = " and ".join(block.owners)
            slots = "#" * block.filled if block.owners else "~" * block.filled
            lines.append(f"block {i:>3}  |{slots:<{self.block_size}}|  {words}")
        if len(self.blocks) > MAX_DRAWN_BLOCKS:
            lines.append(f"and {len(self.blocks) - MAX_DRAWN_BLOCKS} blocks more")
        return "\n".join(lines)

    __repr__ = __str__

    def figure(self) -> Figure:
        """The pool as a row of blocks, each with its slots."""
        return film([(self.sentence, self)])

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, str], dict[str, Any]]:
        return picture_bundle(self.figure(), str(self), self.alt)


def film(frames: list[tuple[str, Snapshot]]) -> Figure:
    """Several snapshots, each with its title, one below the other."""
    num_rows = [-(-min(len(s.blocks), MAX_DRAWN_BLOCKS) // 8) for _, s in frames]
    figure = new_figure(9, sum(1.1 * n + 0.35 for n in num_rows))
    with styled():
        axes = figure.subplots(len(frames), 1, squeeze=False, height_ratios=num_rows)[:, 0]
        for ax, (title, snapshot) in zip(axes, frames):
            draw_blocks(ax, snapshot)
            ax.set_title(title)
    return figure


def draw_blocks(ax: Axes, snapshot: Snapshot) -> None:
    """Draw the pool, eight blocks a row. A block is a box of slots; what is filled has its owner's colour.

    A block that several requests hold is cut into as many bands. One that is free, but still found by the prefix
    cache, is grey.
    """
    blocks = snapshot.blocks[:MAX_DRAWN_BLOCKS]
    for i, block in enumerate(blocks):
        left, top = (i % 8) * 1.12, -(i // 8) * 1.1
        ax.add_patch(Rectangle((left, top), 1, 0.62, facecolor=EMPTY, edgecolor="none"))
        width = block.filled / snapshot.block_size
        bands = block.owners or (("",) if block.cached else ())
        for k, name in enumerate(bands):
            height = 0.62 / len(bands)
            bottom = top + 0.62 - (k + 1) * height
            face, texture = (colour(name), hatch(name)) if name else ("#d0d0d0", "")
            ax.add_patch(
                Rectangle((left, bottom), width, height, facecolor=face, edgecolor="white", hatch=texture, linewidth=0)
            )
            label = dict(ha="left", va="center", fontweight="bold", fontsize=10, color=ink_on(face))
            if name:
                box = dict(boxstyle="round,pad=0.15", facecolor=face, edgecolor="none")
                ax.text(left + 0.07, bottom + height / 2, name, bbox=box, **label)  # type: ignore[arg-type]
            else:
                ax.text(left + 0.5, bottom + height / 2, "kept", ha="center", va="center", color="#444444", fontsize=9)
        if not bands:
            ax.text(left + 0.5, top + 0.31, "free", ha="center", va="center", color=QUIET, fontsize=9)
        for slot in range(1, snapshot.block_size):
            x = left + slot / snapshot.block_size
            ax.plot([x, x], [top, top + 0.62], color="white", linewidth=0.6)
        ax.add_patch(Rectangle((left, top), 1, 0.62, facecolor="none", edgecolor=QUIET, linewidth=0.8))
        ax.text(left + 0.5, top - 0.05, str(i), ha="center", va="top", fontsize=8, color=QUIET)
    ax.set_xlim(-0.03, 8 * 1.12)
    ax.set_ylim(-(-(-len(blocks) // 8) - 1) * 1.1 - 0.28, 0.68)
    ax.axis("off")
