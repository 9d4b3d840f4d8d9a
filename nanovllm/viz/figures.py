"""Frames drawn as static figures, for a saved notebook, for GitHub and for print.

    cache_map_figure(frames, index)   # where every block is, and whose
    timeline_figure(frames, index)    # who computed how many tokens in which step

Each has its words for those who do not see it: `cache_map_alt` and `timeline_alt`.
"""

import textwrap
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from nanovllm.engine.trace import BlockState
from nanovllm.viz.frames import Frame, Frames, RequestFrame
from nanovllm.viz.text import shown_requests
from nanovllm.viz.theme import EMPTY, INK, QUIET, colour, hatch, ink_on, new_figure, styled

MAX_DRAWN_BLOCKS = 64  # a larger pool is drawn as an overview, a small cell for each block
MAX_LETTERED_BLOCKS = 1024  # up to so many, each cell of an overview has its letter
MAX_DRAWN_REQUESTS = 12
MAX_LOGICAL_BLOCKS = 8  # of a longer request, the middle is left out
MAX_ROWS = 64  # of a timeline
KEPT = "#d0d0d0"
MARKS = {
    "hit": ("4", "hit"),
    "preempted": ("x", "preempted"),
    "failed": ("X", "the step fails"),
    "finished": ("|", "finished"),
    "aborted": ("s", "aborted"),
}
BOX = 0.62  # height of a block whose width is 1
PITCH = 1.12  # from a block to the next


# -- The cache map -------------------------------------------------------------------------------------------------------


def cache_map_figure(frames: Frames, index: int) -> Figure:
    """The physical blocks, and below them each request with its logical blocks and where they lie."""
    frame = frames[index]
    told = textwrap.wrap(f"{frame.title}: {frame.sentence}", 120)
    blocks = frame.blocks
    small = len(blocks) <= MAX_DRAWN_BLOCKS
    shown = shown_requests(frame, MAX_DRAWN_REQUESTS if small else MAX_ROWS)
    if small:
        heights = [1.03 * -(-len(blocks) // 8), 0.66 * max(len(shown), 1)]
    else:
        heights = [
            0.29 * -(-len(blocks) // columns(len(blocks))) * 32 / columns(len(blocks)),
            0.3 * -(-len(shown) // 4),
        ]
    figure = new_figure(9, sum(heights) + 0.18 * len(told) + 0.55)
    with styled():
        pool, requests = figure.subplots(2, 1, height_ratios=heights)
        figure.suptitle("\n".join(told), x=0.01, ha="left", fontsize=10, parse_math=False)
        pool.set_title(frame.summary, fontsize=9, color=QUIET)
        if small:
            draw_pool(pool, frames, frame, blocks)
            draw_requests(requests, frames, shown)
        else:
            draw_overview(pool, frames, frame, blocks)
            list_requests(requests, shown)
        left_out = len(frame.requests) - len(shown)
        if left_out:
            requests.set_title(f"and {left_out} more requests", y=-0.12, fontsize=8, color=QUIET)
    return figure


def draw_pool(ax: Axes, frames: Frames, frame: Frame, blocks: tuple[BlockState, ...]) -> None:
    """The pool, eight blocks a row; a block is a box of slots. What the step changed has a bold outline."""
    for i, block in enumerate(blocks):
        left, bottom = (i % 8) * PITCH, -(i // 8) * 1.05
        draw_block(ax, frames, block, left, bottom)
        draw_box(ax, left, bottom, 1, BOX, bold=i in frame.changed)
        ax.text(left + 0.5, bottom - 0.05, str(i), ha="center", va="top", fontsize=8, color=QUIET)
    ax.set_xlim(-0.05, 8 * PITCH - 0.05)
    ax.set_ylim(-(-(-len(blocks) // 8) - 1) * 1.05 - 0.3, BOX + 0.08)
    ax.axis("off")


def draw_block(ax: Axes, frames: Frames, block: BlockState, left: float, bottom: float) -> None:
    """A band for each owner, as wide as the block is filled; grey if the block is only kept."""
    block_size = frames.trace.block_size
    width = block.filled / block_size
    ax.add_patch(Rectangle((left, bottom), 1, BOX, facecolor=EMPTY, edgecolor="none"))
    height = BOX / max(block.ref_count, 1)
    for k, owner in enumerate(block.owners):
        name, low = frames.name(owner), bottom + BOX - (k + 1) * height
        draw_filling(ax, name, left, low, width, height)
        draw_badge(ax, name, left + 0.06, low + height / 2)
    if not block.owners:
        words = "free"
        if block.hash is not None:
            words = f"kept\nplace {block.free_index}"
            ax.add_patch(Rectangle((left, bottom), width, BOX, facecolor=KEPT, edgecolor="none"))
        ax.text(left + 0.5, bottom + BOX / 2, words, ha="center", va="center", color="#444444", fontsize=8)
    for slot in range(1, block_size):
        x = left + slot / block_size
        ax.plot([x, x], [bottom, bottom + BOX], color="white", linewidth=0.6)


def draw_filling(
    ax: Axes, name: str, left: float, bottom: float, width: float, height: float, alpha: float = 1
) -> None:
    face = dict(facecolor=colour(name), edgecolor="white", hatch=hatch(name), linewidth=0, alpha=alpha)
    ax.add_patch(Rectangle((left, bottom), width, height, **face))  # type: ignore[arg-type]


def draw_box(ax: Axes, left: float, bottom: float, width: float, height: float, bold: bool, style: str = "-") -> None:
    line = dict(edgecolor=INK if bold else QUIET, linewidth=2.4 if bold else 0.8, linestyle=style)
    ax.add_patch(Rectangle((left, bottom), width, height, facecolor="none", **line))  # type: ignore[arg-type]


def draw_badge(ax: Axes, name: str, x: float, y: float) -> None:
    """A request's letter on its colour."""
    box = dict(boxstyle="round,pad=0.15", facecolor=colour(name), edgecolor="none")
    style = dict(ha="left", va="center", fontweight="bold", fontsize=9, color=ink_on(colour(name)))
    ax.text(x, y, name, bbox=box, **style)  # type: ignore[arg-type]


def draw_requests(ax: Axes, frames: Frames, shown: list[RequestFrame]) -> None:
    """A row for each request: its tokens in logical blocks, and below each the physical block where it lies."""
    block_size, width, height = frames.trace.block_size, 0.88, 0.4
    for row, r in enumerate(shown):
        bottom = -row
        draw_badge(ax, r.name, 0.02, bottom + height / 2)
        words = f"{r.status}\n{r.num_tokens} tokens"
        ax.text(0.32, bottom + height / 2, words, va="center", fontsize=8)
        num_blocks = len(r.block_table) if r.is_over else -(-r.num_tokens // block_size)
        half = MAX_LOGICAL_BLOCKS // 2
        drawn = [i for i in range(num_blocks) if num_blocks <= MAX_LOGICAL_BLOCKS or not half <= i < num_blocks - half]
        for place, i in enumerate(drawn):
            left = 1.15 + place * (width + 0.08) + (0.1 if i >= half and num_blocks > MAX_LOGICAL_BLOCKS else 0)
            held = i < len(r.block_table)
            if held:
                computed = min(max(r.num_computed_tokens - i * block_size, 0), block_size) / block_size
                draw_filling(ax, r.name, left, bottom, width * computed, 0.07)
                ax.text(left + width / 2, bottom - 0.04, f"in {r.block_table[i]}", ha="center", va="top", fontsize=7)
            draw_box(ax, left, bottom, width, height, bold=False, style="-" if held else ":")
            text = frames.text(r, i * block_size, (i + 1) * block_size)
            words = "\n".join(textwrap.wrap(text, 16, max_lines=2, placeholder="…", drop_whitespace=False))
            style = dict(ha="left", va="center", fontsize=6.5, parse_math=False)
            ax.text(left + 0.03, bottom + 0.24, words, **style)  # type: ignore[arg-type]
    ax.set_xlim(-0.05, 8 * PITCH - 0.05)
    ax.set_ylim(-max(len(shown), 1) + 0.65, height + 0.05)
    ax.axis("off")


def columns(num_blocks: int) -> int:
    """How many cells an overview has in a row."""
    return 32 if num_blocks <= 1024 else 64 if num_blocks <= 4096 else 128


def draw_overview(ax: Axes, frames: Frames, frame: Frame, blocks: tuple[BlockState, ...]) -> None:
    """A small cell for each block: its owner's colour and letter, the number of owners if it is shared."""
    num_columns = columns(len(blocks))
    for i, block in enumerate(blocks):
        x, y = i % num_columns, -(i // num_columns)
        name = frames.name(block.owners[0]) if block.owners else ""
        face = colour(name) if name else KEPT if block.hash is not None else EMPTY
        ax.add_patch(Rectangle((x, y), 0.92, 0.92, facecolor=face, edgecolor="none"))
        if name and len(blocks) <= MAX_LETTERED_BLOCKS:
            words = name if block.ref_count == 1 else f"×{block.ref_count}"
            ax.text(x + 0.46, y + 0.44, words, ha="center", va="center", fontsize=6.5, color=ink_on(face))
        if i in frame.changed:
            draw_box(ax, x, y, 0.92, 0.92, bold=True)
    ax.set_xlim(-0.1, num_columns)
    ax.set_ylim(-(-(-len(blocks) // num_columns)) + 0.95, 1)
    ax.axis("off")


def list_requests(ax: Axes, shown: list[RequestFrame]) -> None:
    """Four requests a line: letter, status, tokens and number of blocks."""
    for k, r in enumerate(shown):
        x, y = k % 4, -(k // 4)
        draw_badge(ax, r.name, x, y)
        words = f"{r.status}, {r.num_tokens} tokens, {len(r.block_table)} blocks"
        ax.text(x + 0.12, y, words, va="center", fontsize=7.5)
    ax.set_xlim(-0.02, 4)
    ax.set_ylim(-max(-(-len(shown) // 4), 1) + 0.4, 0.6)
    ax.axis("off")


def cache_map_alt(frames: Frames, index: int) -> str:
    """The cache map in words."""
    frame = frames[index]
    said = [f"The blocks of the KV cache, {frame.title}: {frame.summary}."]
    for r in shown_requests(frame, MAX_DRAWN_REQUESTS):
        if r.block_table:
            said.append(f"{r.name} holds {', '.join(map(str, r.block_table))}.")
    return " ".join(said)


# -- The timeline --------------------------------------------------------------------------------------------------------


def timeline_figure(frames: Frames, index: int) -> Figure:
    """Requests over steps, and below the tokens of each step in its budget; the frame's own step is shaded."""
    frame, shown = frames[index], shown_requests(frames[-1], MAX_ROWS)
    height = max(0.13 if len(shown) > 16 else 0.3, 0.3 / max(len(shown), 1)) * len(shown)
    figure = new_figure(9, height + 2.6)
    with styled():
        rows, tokens = figure.subplots(2, 1, height_ratios=[height + 0.4, 1.3], sharex=True)
        draw_rows(rows, frames, shown)
        draw_budget(tokens, frames)
        for ax in (rows, tokens):
            if frame.index >= 0:
                ax.axvspan(frame.index - 0.5, frame.index + 0.5, color="#56B4E9", alpha=0.2, linewidth=0, zorder=0)
        num_left_out = len(frames[-1].requests) - len(shown)
        rows.set_ylabel("request" + (f" (and {num_left_out} more)" if num_left_out else ""))
        tokens.set_xlabel("step")
        tokens.set_xlim(-0.5, max(len(frames) - 1, 1) - 0.5)
        tokens.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_rows(ax: Axes, frames: Frames, shown: list[RequestFrame]) -> None:
    """Thick bars for prefill, with the number of tokens; thin ones for decode; a line for waiting; marks for the rest."""
    num_steps = len(frames) - 1
    wide = num_steps <= 45 and len(shown) <= 24  # a chunk has room for its number
    marks: dict[str, list[tuple[int, int]]] = {mark: [] for mark in MARKS}
    for row, r in enumerate(shown):
        history = frames.history(r.id)
        for did, run in groupby(range(num_steps), key=lambda k: history[k].did if history[k] else ""):
            steps = list(run)
            if did == "wait":
                ax.plot([steps[0] - 0.4, steps[-1] + 0.4], [row, row], color=QUIET, linewidth=0.8, linestyle=":")
            elif did == "decode":
                draw_filling(ax, r.name, steps[0] - 0.45, row - 0.17, len(steps) - 0.1, 0.34)
            elif did == "prefill":
                for k in steps:
                    draw_filling(ax, r.name, k - 0.45, row - 0.38, 0.9, 0.76)
                    if wide:
                        box = dict(boxstyle="round,pad=0.1", facecolor=colour(r.name), edgecolor="none")
                        style = dict(ha="center", va="center", fontsize=7, color=ink_on(colour(r.name)), bbox=box)
                        ax.text(k, row, str(history[k].num_new_tokens), **style)
            elif did:
                marks[did] += [(k, row) for k in steps]
        for k, step in enumerate(frames.trace.steps):
            if r.id in step.finished:
                marks[r.status].append((k, row))
            if history[k] and history[k].num_hit_tokens:
                marks["hit"].append((k, row))
    for kind, (marker, label) in MARKS.items():
        if marks[kind]:
            xs, ys = zip(*marks[kind])
            shift = {"hit": -0.45, "finished": 0.5, "aborted": 0.45}.get(kind, 0)
            size = 36 if len(shown) <= 16 else 14
            ax.scatter(
                [x + shift for x in xs], ys, marker=marker, s=size, color=INK, label=label, zorder=3, linewidth=1.4
            )
    thick = Patch(facecolor=QUIET, label="prefill (tokens)")
    handles = [thick, *ax.get_legend_handles_labels()[0]]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), fontsize=8, borderpad=0)
    ax.set_yticks(range(len(shown)), [r.name for r in shown], fontsize=8 if len(shown) <= 24 else 5)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.tick_params(axis="x", labelbottom=False)


def draw_budget(ax: Axes, frames: Frames) -> None:
    """How much of the budget each step used, for prefill and for decode."""
    steps = range(len(frames) - 1)
    total = [frames[k + 1].num_tokens for k in steps]
    decode = [sum(r.num_new_tokens for r in frames[k + 1].requests if r.did == "decode") for k in steps]
    ax.bar(steps, decode, width=0.9, color="#555555", label="decode")
    prefill = [a - b for a, b in zip(total, decode)]
    ax.bar(steps, prefill, bottom=decode, width=0.9, color="#c8c8c8", hatch="///", edgecolor="white", label="prefill")
    budget, most = frames.trace.config["max_num_batched_tokens"], max(total, default=1)
    label = f"budget of {budget} tokens"
    if budget <= 4 * most:
        ax.axhline(budget, color=INK, linestyle="--", linewidth=1, label=label)
    else:
        ax.plot([], [], " ", label=f"{label}: off the scale")
    ax.set_ylabel("tokens")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8, borderpad=0)


def timeline_alt(frames: Frames, index: int) -> str:
    """The timeline in words."""
    frame, trace = frames[index], frames.trace
    num_preempted = sum(len(step.preempted) for step in trace.steps)
    most = max((step.num_tokens for step in trace.steps), default=0)
    return (
        f"{len(trace.requests)} requests over {len(trace.steps)} steps, with {num_preempted} preemptions; a step has up "
        f"to {most} of {trace.config['max_num_batched_tokens']} tokens. {frame.title}: {frame.sentence}"
    )
