"""Frames drawn as static figures, for a saved notebook, for GitHub and for print.

    cache_map_figure(frames, index)   # where every block is, and whose
    timeline_figure(frames, index)    # who computed how many tokens in which step

Each has its words for those who do not see it: `cache_map_alt` and `timeline_alt`.
"""

import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from nanovllm.engine.trace import BlockState
from nanovllm.viz.frames import Frame, Frames, RequestFrame
from nanovllm.viz.sentences import counted, numbered
from nanovllm.viz.text import place, shown_requests
from nanovllm.viz.theme import EMPTY, INK, QUIET, colour, hatch, ink_on, new_figure, styled

MAX_DRAWN_BLOCKS = 64  # a larger pool is drawn as an overview, a small cell for each block
MAX_DRAWN_REQUESTS = 12
MAX_LOGICAL_BLOCKS = 8  # of a longer request, the middle is left out
MAX_ROWS = 64  # of a timeline, or of the list below an overview
KEPT = "#d0d0d0"

BOX = 0.56  # the height of a block; its width is 1
PITCH_X, PITCH_Y = 1.12, 0.92  # from a block to the next
LOGICAL_LEFT, LOGICAL_HEIGHT = 1.18, 0.46  # where a request's logical blocks begin, and their height
CELL = 0.9  # of a cell of the overview; from one to the next is 1
KEY = (
    "Bold outline: changed in this step. Grey: kept for the prefix cache; #1 is the next that is taken.\n"
    "Below, each request's tokens; in 3: these lie in block 3; the stripe: computed so far; dotted: no block yet."
)
OVERVIEW_KEY = (
    "Bold outline: changed in this step. ×2: shared by two. Small grey: kept for the prefix cache. Light grey: free."
)


# -- The cache map -----------------------------------------------------------------------------------------------------


def cache_map_figure(frames: Frames, index: int) -> Figure:
    """The physical blocks, and below them each request with its logical blocks and where they lie."""
    frame = frames[index]
    blocks = frame.blocks
    is_small = len(blocks) <= MAX_DRAWN_BLOCKS
    shown = shown_requests(frame, MAX_DRAWN_REQUESTS if is_small else MAX_ROWS)
    if not is_small:
        shown = [request for request in shown if not request.is_over]
    told = textwrap.wrap(f"{frame.title}: {frame.sentence}", 120)
    if is_small:
        heights = [0.93 * -(-len(blocks) // 8), 0.61 * max(len(shown), 1)]
    else:
        num_columns = columns(len(blocks))
        heights = [8.8 / num_columns * -(-len(blocks) // num_columns), 0.24 * max(-(-len(shown) // 4), 1)]
    figure = new_figure(9, sum(heights) + 0.18 * len(told) + 0.7)
    with styled():
        pool, requests = figure.subplots(2, 1, height_ratios=heights)
        figure.suptitle("\n".join(told), x=0.008, ha="left", fontsize=10, parse_math=False)
        pool.set_title(frame.summary, fontsize=9, color=QUIET)
        if is_small:
            draw_pool(pool, frames, frame, blocks)
            draw_requests(requests, frames, shown)
        else:
            draw_overview(pool, frames, frame, blocks)
            list_requests(requests, shown)
        key = KEY if is_small else OVERVIEW_KEY
        num_left_out = len(frame.requests) - len(shown)
        key += f" And {counted(num_left_out, 'more request')}." if num_left_out else ""
        figure.supxlabel(key.strip(), x=0.008, ha="left", fontsize=7.5, color=QUIET)
    return figure


def film(frames: Frames, indices: Sequence[int]) -> Figure:
    """The blocks of a small pool at several frames, one below the other."""
    num_rows = -(-frames.trace.num_blocks // 8)
    figure = new_figure(9, (0.93 * num_rows + 0.3) * len(indices))
    with styled():
        for ax, index in zip(figure.subplots(len(indices), 1, squeeze=False)[:, 0], indices):
            frame = frames[index]
            draw_pool(ax, frames, frame, frame.blocks)
            ax.set_title(f"{frame.title}: {frame.summary}", fontsize=9)
    return figure


def draw_pool(ax: Axes, frames: Frames, frame: Frame, blocks: tuple[BlockState, ...]) -> None:
    """The pool, eight blocks a row; a block is a box of slots. What the step changed has a bold outline."""
    for i, block in enumerate(blocks):
        left, bottom = i % 8 * PITCH_X, -(i // 8) * PITCH_Y
        draw_block(ax, frames, block, left, bottom)
        draw_outline(ax, left, bottom, 1, BOX, linewidth=2.4 if i in frame.changed else 0.8)
        ax.text(left + 0.5, bottom - 0.04, str(i), ha="center", va="top", fontsize=8, color=QUIET)
    ax.set_xlim(-0.03, 8 * PITCH_X - 0.08)
    ax.set_ylim(-(-(-len(blocks) // 8) - 1) * PITCH_Y - 0.28, BOX + 0.05)
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
        draw_badge(ax, name, left + 0.05, low + height / 2)
    if block.hash is not None and not block.owners:
        ax.add_patch(Rectangle((left, bottom), width, BOX, facecolor=KEPT, edgecolor="none"))
    slots = [left + slot / block_size for slot in range(1, block_size)]
    ax.vlines(slots, bottom, bottom + BOX, color="white", linewidth=0.6)
    if not block.owners:
        words = "free" if block.hash is None else f"kept\n#{place(block)}"
        ax.text(left + 0.5, bottom + BOX / 2, words, ha="center", va="center", color="#444444", fontsize=8)


def draw_filling(ax: Axes, name: str, left: float, bottom: float, width: float, height: float) -> None:
    style: dict[str, Any] = dict(facecolor=colour(name), edgecolor="white", hatch=hatch(name), linewidth=0)
    ax.add_patch(Rectangle((left, bottom), width, height, **style))


def draw_outline(ax: Axes, left: float, bottom: float, width: float, height: float, **style: Any) -> None:
    edge = INK if style["linewidth"] > 1 else QUIET
    ax.add_patch(Rectangle((left, bottom), width, height, facecolor="none", edgecolor=edge, zorder=2.5, **style))


def draw_badge(ax: Axes, name: str, x: float, y: float) -> None:
    """A request's letter on its colour."""
    box = dict(boxstyle="round,pad=0.15", facecolor=colour(name), edgecolor="none")
    style: dict[str, Any] = dict(ha="left", va="center", fontweight="bold", fontsize=9, color=ink_on(colour(name)))
    ax.text(x, y, name, bbox=box, **style)


def draw_requests(ax: Axes, frames: Frames, shown: list[RequestFrame]) -> None:
    """A row for each request: its tokens in logical blocks, and below each the physical block where it lies."""
    counts = [0 if r.is_over else -(-r.num_tokens // frames.trace.block_size) for r in shown]
    room = next((n for n in (4, 6) if max(counts, default=0) <= n), MAX_LOGICAL_BLOCKS)  # side by side
    pitch = (8 * PITCH_X - LOGICAL_LEFT - 0.2) / room
    for row, (r, count) in enumerate(zip(shown, counts)):
        draw_badge(ax, r.name, 0.03, LOGICAL_HEIGHT / 2 - row)
        words = f"{r.status}\n{counted(r.num_tokens, 'token')}"
        ax.text(0.3, LOGICAL_HEIGHT / 2 - row, words, va="center", fontsize=8)
        half = room // 2
        drawn = [*range(half), *range(count - half, count)] if count > room else range(count)
        for column, i in enumerate(drawn):
            gap = 0.12 if count > room and column >= half else 0
            draw_logical_block(ax, frames, r, i, LOGICAL_LEFT + column * pitch + gap, -row, pitch - 0.08)
        if count > room:
            ax.text(LOGICAL_LEFT + half * pitch + 0.02, LOGICAL_HEIGHT / 2 - row, "…", ha="center", va="center")
    ax.set_xlim(-0.03, 8 * PITCH_X - 0.08)
    ax.set_ylim(-max(len(shown), 1) + 0.72, LOGICAL_HEIGHT + 0.1)
    ax.axis("off")


def draw_logical_block(
    ax: Axes, frames: Frames, r: RequestFrame, i: int, left: float, bottom: float, width: float
) -> None:
    """Its text; a stripe as long as it is computed; its physical block. Dotted if it has none yet."""
    block_size = frames.trace.block_size
    is_held = i < len(r.block_table)
    if is_held:
        computed = min(r.num_computed_tokens - i * block_size, block_size) / block_size
        draw_filling(ax, r.name, left, bottom, width * computed, 0.08)
        ax.text(left + width / 2, bottom - 0.03, f"in {r.block_table[i]}", ha="center", va="top", fontsize=7.5)
    draw_outline(ax, left, bottom, width, LOGICAL_HEIGHT, linewidth=0.8, linestyle="-" if is_held else ":")
    text = frames.text(r, i * block_size, (i + 1) * block_size)
    words = "\n".join(textwrap.wrap(text.strip(), int(19 * width), max_lines=2, placeholder="…"))
    ax.text(left + 0.03, bottom + 0.27, words, va="center", fontsize=6.5, parse_math=False)


def columns(num_blocks: int) -> int:
    """How many cells an overview has in a row."""
    return 32 if num_blocks <= 1024 else 64


def draw_overview(ax: Axes, frames: Frames, frame: Frame, blocks: tuple[BlockState, ...]) -> None:
    """A small cell for each block: its owner's colour and, at the first of each stretch, its letter."""
    num_columns = columns(len(blocks))
    cells = []
    last = None
    for i, block in enumerate(blocks):
        x, y = i % num_columns, -(i // num_columns)
        name = frames.name(block.owners[0]) if block.owners else ""
        words = f"×{block.ref_count}" if block.ref_count > 1 else name
        cells.append(Rectangle((x, y), CELL, CELL, facecolor=colour(name) if name else EMPTY))
        if block.hash is not None and not name:
            cells.append(Rectangle((x + CELL / 4, y + CELL / 4), CELL / 2, CELL / 2, facecolor="#a8a8a8"))
        if words and (words != last or x == 0 or num_columns == 32):
            ink = ink_on(colour(name))
            ax.text(x + CELL / 2, y + CELL / 2, words, ha="center", va="center_baseline", fontsize=6.5, color=ink)
        last = words
        if i in frame.changed:
            draw_outline(ax, x, y, CELL, CELL, linewidth=2.4 if num_columns == 32 else 1.2)
        if x == 0:
            ax.text(-0.2, y + CELL / 2, str(i), ha="right", va="center", fontsize=6.5, color=QUIET)
    ax.add_collection(PatchCollection(cells, match_original=True, linewidth=0, zorder=0.5))
    ax.set_xlim(-num_columns / 32, num_columns)
    ax.set_ylim(-(-(-len(blocks) // num_columns)) + 0.95, 1)
    ax.axis("off")


def list_requests(ax: Axes, shown: list[RequestFrame]) -> None:
    """Four requests a line: letter, status, tokens and number of blocks."""
    for k, r in enumerate(shown):
        draw_badge(ax, r.name, k % 4, -(k // 4))
        words = f"{r.status}, {counted(r.num_tokens, 'token')}, {counted(len(r.block_table), 'block')}"
        ax.text(k % 4 + 0.14, -(k // 4), words, va="center", fontsize=7.5)
    ax.set_xlim(-0.02, 4)
    ax.set_ylim(-max(-(-len(shown) // 4), 1) + 0.4, 0.6)
    ax.axis("off")


def cache_map_alt(frames: Frames, index: int) -> str:
    """The cache map in words."""
    frame = frames[index]
    said = [f"The blocks of the KV cache, {frame.title}: {frame.summary}."]
    for r in shown_requests(frame, MAX_DRAWN_REQUESTS):
        if r.block_table:
            said.append(f"{r.name} holds {numbered(r.block_table)}.")
    return " ".join(said)


# -- The timeline ------------------------------------------------------------------------------------------------------

MARKS = {  # of a request in a step: marker, where it stands beside the middle of the step, label
    "hit": ("$\\mathrm{H}$", -0.34, "hit in the prefix cache"),
    "preempted": ("x", 0, "preempted"),
    "failed": ("$\\mathrm{!}$", 0, "the step fails"),
    "finished": ("|", 0.5, "finished"),
    "aborted": ("$\\mathrm{A}$", 0, "aborted"),
}


def timeline_figure(frames: Frames, index: int) -> Figure:
    """Requests over steps, and below the tokens of each step in its budget; the frame's own step is shaded."""
    frame, last = frames[index], frames[-1]
    shown = shown_requests(last if len(last.requests) <= MAX_ROWS else frame, MAX_ROWS)
    height = (0.13 if len(shown) > 16 else 0.3) * max(len(shown), 2)
    figure = new_figure(9, height + 2.4)
    with styled():
        rows, tokens = figure.subplots(2, 1, height_ratios=[height, 1.2], sharex=True)
        draw_rows(rows, frames, shown)
        draw_budget(tokens, frames)
        for ax in (rows, tokens):
            if frame.index >= 0:
                ax.axvspan(frame.index - 0.5, frame.index + 0.5, color="#56B4E9", alpha=0.25, linewidth=0, zorder=0)
        num_left_out = len(last.requests) - len(shown)
        rows.set_ylabel("request" + (f" (and {num_left_out} more)" if num_left_out else ""))
        tokens.set_xlabel("step")
        tokens.set_xlim(-0.6, max(len(frames) - 1, 12) - 0.3)
    return figure


def draw_rows(ax: Axes, frames: Frames, shown: list[RequestFrame]) -> None:
    """Thick bars for prefill, with the number of tokens; thin ones for decode; dots for waiting; marks for the rest."""
    is_dense = len(shown) > 16
    has_numbers = len(frames) <= 50 and not is_dense  # else there is no room for them
    marks: dict[str, list[tuple[float, int]]] = {kind: [] for kind in MARKS}
    for row, r in enumerate(shown):
        history = frames.history(r.id)
        for did, run in groupby(enumerate(history), key=lambda item: item[1].did if item[1] else ""):
            steps = [k for k, _ in run]
            first, length = steps[0] - 0.45, len(steps) - 0.1
            if did == "wait":
                ax.hlines(row, first, first + length, color=QUIET, linewidth=0.9, linestyle=":")
            elif did == "decode":
                draw_filling(ax, r.name, first, row - 0.17, length, 0.34)
            elif did == "prefill":
                for k in steps:
                    draw_filling(ax, r.name, k - 0.45, row - 0.38, 0.9, 0.76)
            elif did:
                marks[did] += [(k, row) for k in steps]
        for k, now in enumerate(history):
            if now and now.did == "prefill" and has_numbers:
                draw_number(ax, r.name, k, row, f"{'H' if now.num_hit_tokens else ''}{now.num_new_tokens}")
            elif now and now.num_hit_tokens:
                marks["hit"].append((k, row))
            if now and r.id in frames.trace.steps[k].finished:
                marks[now.status].append((k, row))
    for kind, (marker, shift, label) in MARKS.items():
        if marks[kind]:
            xs, ys = [k + shift for k, _ in marks[kind]], [row for _, row in marks[kind]]
            size = 14 if is_dense else 32
            ax.scatter(xs, ys, marker=marker, s=size, color=INK, label=label, zorder=3, linewidth=1)  # type: ignore
    handles: list[Any] = [
        Patch(facecolor=QUIET, label="prefill" + (" of so many tokens, H after a hit" if has_numbers else "")),
        Line2D([], [], color=QUIET, linewidth=3, label="decode"),
        Line2D([], [], color=QUIET, linewidth=0.9, linestyle=":", label="waits"),
    ]
    legend_above(ax, handles + ax.get_legend_handles_labels()[0])
    ax.set_yticks(range(len(shown)), [r.name for r in shown], fontsize=5.5 if is_dense else 9)
    ax.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    ax.tick_params(axis="x", labelbottom=False)


def draw_number(ax: Axes, name: str, k: int, row: int, number: str) -> None:
    box = dict(boxstyle="round,pad=0.1", facecolor=colour(name), edgecolor="none")
    ink = ink_on(colour(name))
    ax.text(k, row + 0.03, number, ha="center", va="center", fontsize=7, color=ink, bbox=box)


def draw_budget(ax: Axes, frames: Frames) -> None:
    """How much of the budget each step used, for prefill and for decode."""
    steps = range(len(frames) - 1)
    total = [frames[k + 1].num_tokens for k in steps]
    decode = [sum(r.num_new_tokens for r in frames[k + 1].requests if r.did == "decode") for k in steps]
    prefill = [a - b for a, b in zip(total, decode)]
    style: dict[str, Any] = dict(width=0.9, hatch="///", edgecolor="white")
    if len(steps) > 150:
        style = dict(width=1)  # bars of a pixel or two: an edge would leave nothing of them
    ax.bar(steps, decode, width=style["width"], color="#555555", label="decode")
    ax.bar(steps, prefill, bottom=decode, color="#b8b8b8", label="prefill", **style)
    budget, most = frames.trace.config["max_num_batched_tokens"], max(total, default=1)
    if budget <= 4 * most:
        ax.axhline(budget, color=INK, linestyle="--", linewidth=1, label=f"the budget: {budget} tokens a step")
        ax.set_ylim(0, budget * 1.05)
    else:
        ax.plot([], [], " ", label=f"the budget, {budget} tokens a step, is off the scale")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_ylabel("tokens")
    legend_above(ax, ax.get_legend_handles_labels()[0])


def legend_above(ax: Axes, handles: list[Any]) -> None:
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), fontsize=8, borderpad=0)


def timeline_alt(frames: Frames, index: int) -> str:
    """The timeline in words."""
    frame, trace = frames[index], frames.trace
    num_preempted = sum(len(step.preempted) for step in trace.steps)
    most = max((step.num_tokens for step in trace.steps), default=0)
    words = [
        f"{counted(len(trace.requests), 'request')} over {counted(len(trace.steps), 'step')},",
        f"with {counted(num_preempted, 'preemption')};",
        f"a step has up to {most} of {trace.config['max_num_batched_tokens']} tokens.",
        f"{frame.title.capitalize()}: {frame.sentence}",
    ]
    return " ".join(words)
