"""Frames drawn as characters: for a terminal, for a screen reader, and for the test run, which compares them.

    print(cache_map_text(frames, index))   # every block, every request, and what each step changed
    print(timeline_text(frames, index))    # who computed how many tokens in which step

Both end with a digest of the whole run, so that no difference escapes, though a long run is not told to its end.
"""

from nanovllm.engine.trace import BlockState
from nanovllm.viz.frames import Frame, Frames, RequestFrame
from nanovllm.viz.sentences import counted

MAX_BLOCK_LINES = 16  # a pool of up to so many blocks has a line for each
MAX_BLOCKS = 64  # up to so many have a word for each; above, a character stands for several
MAX_REQUESTS = 16
MAX_STEPS = 24  # so many steps are told in words
MAX_COLUMNS = 20  # so many steps stand side by side in a timeline
MAX_TABLE = 12  # so many entries of a block table are written out

LEGEND = """\
P8 prefill of 8 tokens, H8 the same after a hit in the prefix cache, D decode, . waits, X preempted, ! the step fails;
F after it: finished, A: aborted"""


def cache_map_text(frames: Frames, index: int) -> str:
    """The blocks and the requests at a frame, then what every step of the run changed, then a digest of all frames."""
    frame = frames[index]
    lines = [f"{frame.title}: {frame.sentence}", frame.summary, *request_lines(frame)]
    lines += block_lines(frames, index)
    return "\n".join([*lines, "", *history_lines(frames)])


def request_lines(frame: Frame) -> list[str]:
    """A line for each request. Of many, the finished ones are left out first."""
    shown = shown_requests(frame, MAX_REQUESTS)
    lines = ["request  status     tokens  computed  block table"] if shown else []
    for r in shown:
        table = " ".join(map(str, r.block_table[:MAX_TABLE])) + (" ..." if len(r.block_table) > MAX_TABLE else "")
        lines.append(f"{r.name:<7}  {r.status:<9}  {r.num_tokens:>6}  {r.num_computed_tokens:>8}  {table}".rstrip())
    if len(shown) < len(frame.requests):
        lines.append(f"and {counted(len(frame.requests) - len(shown), 'more request')}")
    return lines


def shown_requests(frame: Frame, limit: int) -> list[RequestFrame]:
    """At most `limit` requests, in the order of coming: those that are not over rather than those that are."""
    by_interest = sorted(frame.requests, key=lambda r: r.is_over)[:limit]
    return [r for r in frame.requests if r in by_interest]


def block_lines(frames: Frames, index: int) -> list[str]:
    """The pool: a line a block, eight words a line, or a character for several blocks, whatever fits."""
    frame = frames[index]
    blocks = frame.blocks
    if len(blocks) <= MAX_BLOCK_LINES:
        return [block_line(frames, i, block) + ("  *" if i in frame.changed else "") for i, block in enumerate(blocks)]
    if len(blocks) <= MAX_BLOCKS:
        words = [block_word(frames, block) for block in blocks]
        width = max(map(len, words)) + 1
        rows = range(0, len(words), 8)
        lines = [f"block {i:>3}  " + "".join(f"{word:<{width}}" for word in words[i : i + 8]).rstrip() for i in rows]
        return [*lines, "A:5 holds 5 tokens of request A; ~2 kept, second in the queue of free blocks; . free"]
    blocks_per_cell = -(-len(blocks) // MAX_BLOCKS)
    cells = ""
    for i in range(0, len(blocks), blocks_per_cell):
        cell = blocks[i : i + blocks_per_cell]
        num_held = sum(block.ref_count > 0 for block in cell)
        kept = any(block.hash is not None for block in cell)
        cells += "#" if num_held == len(cell) else "+" if num_held else "~" if kept else "."
    return [
        f"|{cells}|",
        f"{blocks_per_cell} blocks a character: # all held, + some held, ~ none held, some kept, . free",
    ]


def block_line(frames: Frames, i: int, block: BlockState) -> str:
    if block.owners:
        words = " and ".join(frames.name(owner) for owner in block.owners)
    else:
        words = "free" if block.hash is None else f"kept, #{place(block)} in the queue"
    slots = ("#" if block.owners else "~") * block.filled
    return f"block {i:>3}  |{slots:<{frames.trace.block_size}}|  {words}"


def block_word(frames: Frames, block: BlockState) -> str:
    if block.owners:
        return "+".join(frames.name(owner) for owner in block.owners) + f":{block.filled}"
    return "." if block.hash is None else f"~{place(block)}"


def place(block: BlockState) -> int:
    """A free block's place in the queue, counted from 1: the next to be taken."""
    assert block.free_index is not None
    return block.free_index + 1


def history_lines(frames: Frames) -> list[str]:
    """A line a step, from the beginning, then the digest over all of them."""
    shown = range(1, min(len(frames), MAX_STEPS + 1))
    lines = [f"{frames[i].title}: {frames[i].sentence}" for i in shown]
    if len(frames) > MAX_STEPS + 1:
        lines.append(f"... and {counted(len(frames) - 1 - MAX_STEPS, 'more step')}")
    return [*lines, f"digest {frames.digest()}"]


def timeline_text(frames: Frames, index: int) -> str:
    """Requests as rows, steps as columns, the step's tokens below; a ^ stands under the step of frame `index`."""
    frame = frames[index]
    num_steps = len(frames) - 1
    first = max(0, min(frame.index - MAX_COLUMNS // 2, num_steps - MAX_COLUMNS))
    steps = range(first, min(num_steps, first + MAX_COLUMNS))
    rows = [["step", *map(str, steps)]]
    seen = [(frames[k + 1].requests, frames.trace.steps[k].finished) for k in steps]
    for i, r in enumerate(frames[-1].requests):
        row = [r.name, *(cell(requests[i], r.id in ended) if i < len(requests) else "" for requests, ended in seen)]
        rows += [row] if any(row[1:]) else []
    num_left_out = max(0, len(rows) - 1 - MAX_REQUESTS)
    rows = rows[: 1 + MAX_REQUESTS]
    rows.append(["tokens", *(str(frames[k + 1].num_tokens) for k in steps)])
    rows.append(["", *("^" if k == frame.index else "" for k in steps)])
    width = max(len(text) for row in rows for text in row[1:] or [""]) + 1
    lines = [f"{row[0]:<6}  " + "".join(f"{text:<{width}}" for text in row[1:]) for row in rows]
    if num_left_out:
        lines.insert(-2, f"and {counted(num_left_out, 'more request')}")
    lines.append(f"The budget is {frames.trace.config['max_num_batched_tokens']} tokens a step.")
    lines += [LEGEND, f"digest {frames.digest()}"]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def cell(request: RequestFrame, ends: bool) -> str:
    """What a request did in a step, in a few characters; `ends` if it was finished or aborted in it."""
    words = {"decode": "D", "wait": ".", "preempted": "X", "failed": "!"}.get(request.did, "")
    if request.did == "prefill":
        words = f"{'H' if request.num_hit_tokens else 'P'}{request.num_new_tokens}"
    if ends:
        words = words.strip(".") + ("A" if request.status == "aborted" else "F")
    return words
