"""What chapter 06 shares: parts of chapter 01's decoder, pictures of matrices and messages, exercise checks."""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, Queue
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from nanovllm import LLM
from nanovllm.lessons.checks import NotAttempted, attempted, exercise
from nanovllm.viz.rank_map import draw_box, look
from nanovllm.viz.slices import ALL, Slices, placed
from nanovllm.viz.theme import EMPTY, INK, QUIET, ink_on, new_figure, styled

# -- What chapter 01 has written ---------------------------------------------------------------------------------------

HEAD_DIM = 64


def norm(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm, as in chapter 01."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5) * weights[f"{name}.weight"]


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE, as in chapter 01: `x` is `[tokens, heads, 64]`."""
    speeds = 100_000.0 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    angles = positions[:, None, None] * speeds
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention, as in chapter 01, of any number of heads: `[tokens, heads, 64]`, twice `[…, KV heads, 64]`."""
    sharing = query.size(1) // key.size(1)
    query = query.transpose(0, 1) / HEAD_DIM**0.5
    key, value = (x.repeat_interleave(sharing, dim=1).transpose(0, 1) for x in (key, value))
    ahead = torch.ones(query.size(1), key.size(1), dtype=torch.bool).triu(key.size(1) - query.size(1) + 1)
    scores = (query @ key.transpose(1, 2)).masked_fill_(ahead, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(0, 1).flatten(1)


# -- Matrices that a reader can see ------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """A small matrix with its name. `cut`: "columns" or "rows", which belong to one rank after the other; None if
    every rank has all of it; or the number of the rank whose it is."""

    name: str
    values: torch.Tensor
    cut: str | int | None = None


def owner(matrix: Matrix, row: int, column: int, size: int) -> int | None:
    """Whose a number is, of `size` ranks; None if everybody has it."""
    if matrix.cut is None or isinstance(matrix.cut, int):
        return matrix.cut
    index, length = (row, len(matrix.values)) if matrix.cut == "rows" else (column, matrix.values.size(1))
    return index * size // length


def draw_products(lines: Sequence[Sequence[Matrix | str]], size: int = 3) -> Figure:
    """Lines of matrices, with signs between them. Each number has the colour and the hatching of its rank."""
    heights = [max(len(item.values) for item in line if isinstance(item, Matrix)) + 1.1 for line in lines]
    length = max(sum(width_of(item) for item in line) for line in lines)
    figure = new_figure(9, 0.29 * sum(heights) + 0.35)
    with styled():
        ax = figure.subplots()
        top = 0.0
        for line, height in zip(lines, heights):
            left, middle = 0.0, top + 0.9 + (height - 1.1) / 2
            for item in line:
                if isinstance(item, str):
                    ax.text(left + width_of(item) / 2, middle, item, ha="center", va="center", fontsize=12)
                else:
                    draw_matrix(ax, item, left, middle - len(item.values) / 2, size)
                left += width_of(item)
            top += height
        ax.set(xlim=(-0.2, max(length, 30)), ylim=(top + 0.2, -0.1), aspect="equal")
        ax.axis("off")
        handles = [
            Patch(facecolor=look(r)[0], hatch=look(r)[1], edgecolor="white", label=f"rank {r}") for r in range(size)
        ]
        handles.append(Patch(facecolor=EMPTY, edgecolor=QUIET, label="everybody"))
        figure.legend(handles=handles, loc="outside upper right", ncols=size + 1, fontsize=9)
    return figure


def width_of(item: Matrix | str) -> float:
    return 1.2 * item.values.size(1) + 0.5 if isinstance(item, Matrix) else 0.5 + 0.32 * len(item)


def draw_matrix(ax: Axes, matrix: Matrix, left: float, top: float, size: int) -> None:
    """A box for each number, with its rank's look; the name stands above."""
    rows, columns = matrix.values.shape
    for row in range(rows):
        for column in range(columns):
            rank = owner(matrix, row, column, size)
            colour, hatching = (EMPTY, "") if rank is None else look(rank)
            place = (left + 1.2 * column, top + row)
            style: dict[str, Any] = dict(facecolor=colour, edgecolor=QUIET if rank is None else "white", linewidth=0.7)
            ax.add_patch(Rectangle(place, 1.2, 1, hatch=hatching, **style))
            plate = dict(boxstyle="round,pad=0.08", facecolor=colour, edgecolor="none")
            words: dict[str, Any] = dict(ha="center", va="center_baseline", fontsize=8.5, bbox=plate)
            number = f"{matrix.values[row, column]:g}"
            ax.text(place[0] + 0.6, top + row + 0.5, number, color=ink_on(colour) if rank is not None else INK, **words)
    ax.text(left, top - 0.35, matrix.name, fontsize=9, fontweight="bold", va="center_baseline")


# -- The opening picture -----------------------------------------------------------------------------------------------


def record_ranks() -> list[dict[str, Any]]:
    """What three ranks of the default model say that they hold."""
    llm = LLM(device="cpu", dtype="float32", num_kv_blocks=8, tensor_parallel_size=3)
    told: list[dict[str, Any]] = llm.engine.model_runner.describe()
    llm.close()
    return told


def draw_layer() -> Figure:
    """Layer 0 of the default model on three ranks, in the order in which a token passes through its matrices."""
    slices = Slices({"three ranks": record_ranks()})
    tensors = {tensor.short_name: tensor for tensor in slices.runs["three ranks"]["layer 0"]}
    columns = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    scale, gap, figure = 0.155, 60.0, new_figure(9, 3.7)
    with styled():
        ax = figure.subplots()
        left, lowest = 0.0, 0.0
        for i, names in enumerate(columns):
            top, widest = 30.0, 0.0
            for k, name in enumerate(names):
                box = placed(tensors[name], left, top, scale, narrow=0)
                if name == "up_proj":  # beside gate
                    box = placed(tensors[name], left + 100, 30.0, scale, narrow=0)
                draw_box(ax, box, ALL)
                top, widest = box.top + box.height + 34, max(widest, box.left + box.width - left)
                lowest = max(lowest, box.top + box.height)
            left += widest
            words = "attention" if i == 0 else "activation" if i == 2 else ""
            draw_step(ax, left, left + gap + 14 * (i % 2), words, is_exchange=i % 2 == 1)
            left += gap + 14 * (i % 2)
        ax.text(0, lowest + 4, "copied to every rank: the two norms, and x", fontsize=9, color=QUIET, va="center")
        ax.set(xlim=(-4, left + 12), ylim=(lowest + 16, 0), aspect="equal")
        ax.axis("off")
        handles = [
            Patch(facecolor=look(r)[0], hatch=look(r)[1], edgecolor="white", label=f"rank {r}") for r in range(3)
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=3, fontsize=9)
    return figure


def draw_step(ax: Axes, start: float, end: float, words: str, is_exchange: bool) -> None:
    """An arrow from one matrix to the next, and what happens there: on each rank alone, or between all of them."""
    middle = (start + end) / 2
    arrow: dict[str, Any] = dict(arrowstyle="-|>", mutation_scale=11, color=INK if is_exchange else QUIET)
    ax.add_patch(FancyArrowPatch((start + 4, 75), (end - 4, 75), shrinkA=0, shrinkB=0, **arrow))
    if is_exchange:
        box = dict(boxstyle="round,pad=0.3", facecolor=INK, edgecolor="none")
        style: dict[str, Any] = dict(ha="center", va="center", fontsize=8.5, fontweight="bold", color="white", bbox=box)
        ax.text(middle, 75, "all-\nreduce", **style)
    else:
        ax.text(middle, 62, words, ha="center", va="center", fontsize=8, color=QUIET, parse_math=False)


# -- Messages in a ring ------------------------------------------------------------------------------------------------


def contributors(value: float, size: int) -> list[int]:
    """Whose numbers a sum holds, if rank r gave 2**r."""
    return [rank for rank in range(size) if int(value) >> rank & 1]


def draw_messages(sent: Sequence[Sequence[torch.Tensor]]) -> Figure:
    """What each rank passes on to the next, step by step; `sent[r]` are rank r's messages, made of powers of two."""
    size, num_steps = len(sent), len(sent[0])
    figure = new_figure(9, 0.75 * size + 0.9)
    with styled():
        ax = figure.subplots()
        for rank in range(size):
            ax.text(-0.35, rank + 0.5, f"rank {rank}", ha="right", va="center", fontsize=9.5)
            for step in range(num_steps):
                inside = contributors(sent[rank][step].flatten()[0].item(), size)
                draw_message(ax, step, rank, inside, size)
                if step + 1 < num_steps:
                    to = (rank + 1) % size
                    start, end = (step + 0.81, rank + 0.5), (step + 0.99, to + 0.5)
                    style: dict[str, Any] = dict(arrowstyle="-|>", mutation_scale=10, color=QUIET, linewidth=0.9)
                    ax.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, zorder=0, **style))
        half = num_steps // 2
        for first, words in ((0, "reduce-scatter: everybody adds"), (half, "all-gather: everybody copies")):
            ax.text(first + 0.02, -0.22, words, fontsize=9, va="center", color=INK)
        ax.axvline(half - 0.1, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.set(xlim=(-0.9, num_steps), ylim=(size, -0.45))
        ax.set_xticks([step + 0.4 for step in range(num_steps)], [f"step {step}" for step in range(num_steps)])
        ax.set_yticks([])
        ax.tick_params(length=0)
        ax.spines[["left", "bottom"]].set_visible(False)
    return figure


def draw_message(ax: Axes, step: int, rank: int, inside: Sequence[int], size: int) -> None:
    """A piece on its way: one field for each rank, filled if that rank's numbers are in it."""
    wide = 0.8 / size
    for r in range(size):
        colour, hatching = look(r) if r in inside else (EMPTY, "")
        place = (step + wide * r, rank + 0.22)
        ax.add_patch(Rectangle(place, wide, 0.56, facecolor=colour, hatch=hatching, edgecolor="white", linewidth=0.8))
        if r in inside:
            plate = dict(boxstyle="round,pad=0.1", facecolor=colour, edgecolor="none")
            words: dict[str, Any] = dict(ha="center", va="center_baseline", fontsize=8.5, bbox=plate)
            ax.text(place[0] + wide / 2, rank + 0.5, str(r), color=ink_on(colour), **words)
    ax.add_patch(Rectangle((step, rank + 0.22), 0.8, 0.56, facecolor="none", edgecolor=INK, linewidth=0.9))


# -- Exercise checks ---------------------------------------------------------------------------------------------------

PATIENCE = 2.0  # seconds that a rank of a check waits for a message


class NoMessage(Exception):
    """A rank waited for a message that never came."""


Boxes = dict[tuple[int, int], "Queue[tuple[int, torch.Tensor]]"]  # by sender and receiver: what is on its way


class Peer:
    """A rank of a check: it can send to every other one. It counts what it sends, and what it waits for in a row."""

    def __init__(self, number: int, boxes: Boxes, size: int) -> None:
        self.number, self.size = number, size
        self._boxes = boxes
        self.num_sent = 0
        self.num_in_a_row = 0  # messages of which each was sent when the one before had arrived, here or elsewhere

    def send(self, to: int, tensor: torch.Tensor) -> None:
        """Send a copy to rank `to`."""
        if to == self.number or not 0 <= to < self.size:
            raise ValueError(f"rank {self.number} of {self.size} sends to rank {to}")
        self.num_sent += 1
        self._boxes[self.number, to].put((self.num_in_a_row, tensor.clone()))

    def receive(self, sender: int) -> torch.Tensor:
        """Wait for the next message from rank `sender`."""
        try:
            before, tensor = self._boxes[sender, self.number].get(timeout=PATIENCE)
        except (Empty, KeyError):
            raise NoMessage(f"rank {self.number} waits for a message from rank {sender}, and none comes") from None
        self.num_in_a_row = max(self.num_in_a_row, before + 1)
        return tensor


def on_peers(size: int, program: Callable[[Peer], Any]) -> tuple[list[Peer], list[Any]]:
    """Run a program on every rank, each in a thread of its own."""
    boxes: Boxes = {(a, b): Queue() for a in range(size) for b in range(size) if a != b}
    peers = [Peer(number, boxes, size) for number in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return peers, list(pool.map(program, peers))


@exercise(1, "Once, by whoever; in vLLM it is rank 0.")
def check_row_parallel(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    for size in (1, 2, 3, random.randint(4, 6)):
        tokens, each, outputs = random.randint(1, 4), random.randint(1, 4), random.randint(2, 5)
        x = torch.tensor([[random.randint(-3, 3) for _ in range(size * each)] for _ in range(tokens)])
        weight = torch.tensor([[random.randint(-3, 3) for _ in range(size * each)] for _ in range(outputs)])
        bias = torch.tensor([random.randint(1, 9) for _ in range(outputs)]) * 10
        right = x @ weight.T + bias
        results, calls = row_parallel_on(size, answer, x, weight, bias)
        for rank, result in enumerate(results):
            case = f"with {size} rank{'s' * (size > 1)}, rank {rank}"
            if not isinstance(result, torch.Tensor) or result.shape != right.shape:
                shape = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
                yield f"{case} returns {shape}; the whole product is {list(right.shape)}, on every rank."
            elif max(calls) > 1:
                yield f"{case} calls all_reduce {max(calls)} times. Once is enough."
            elif torch.equal(result, right):
                continue
            elif torch.equal(result, right + (size - 1) * bias):
                yield f"{case} has the bias {size} times in its result: everybody adds it, and then the sums are added."
            elif torch.equal(result, right - bias):
                yield f"{case} has no bias in its result."
            else:
                said = "" if calls[rank] else " It never calls all_reduce, so it knows its own partial sum alone."
                yield f"{case} returns {result.tolist()}, and x · A + bias is {right.tolist()}.{said}"


def row_parallel_on(
    size: int, answer: Callable[..., Any], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[list[Any], list[int]]:
    """The reader's product on every rank at the same time; what each returns, and how often each called all_reduce."""
    barrier, given, calls = threading.Barrier(size), [torch.empty(0)] * size, [0] * size

    def on_rank(rank: int) -> Any:
        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            calls[rank] += 1
            given[rank] = tensor
            try:
                barrier.wait(PATIENCE)
                total = torch.stack(given).sum(dim=0)
                barrier.wait(PATIENCE)
            except threading.BrokenBarrierError:
                raise NoMessage("some ranks call all_reduce, and others do not: those who call wait for ever") from None
            return total

        slices = x.chunk(size, dim=1)[rank], weight.chunk(size, dim=1)[rank]
        return answer(rank, *slices, bias, all_reduce)

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(on_rank, range(size)))
    return [attempted(result) for result in results], calls


@exercise(2, "Few messages, each of them whole: this is what a small tensor wants, and a large one does not.")
def check_doubling(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    for size in (2, 4, 8, 1):
        inputs = [torch.tensor([random.randint(0, 99) for _ in range(6)]) for _ in range(size)]
        right = torch.stack(inputs).sum(dim=0)
        try:
            peers, results = on_peers(size, lambda peer: answer(peer, inputs[peer.number].clone()))
        except NoMessage as error:
            yield f"with {size} ranks, {error}: everybody is stuck. Who sends to whom in that round?"
            return
        if results[0] is None or results[0] is ...:
            raise NotAttempted
        rounds = size.bit_length() - 1
        most, in_a_row = max(peer.num_sent for peer in peers), max(peer.num_in_a_row for peer in peers)
        for rank, result in enumerate(results):
            if not isinstance(result, torch.Tensor) or result.shape != right.shape:
                yield f"with {size} ranks, rank {rank} returns {result!r}, and not a tensor like the one it was given."
            elif not torch.equal(result, right):
                yield (
                    f"with {size} ranks, rank {rank} returns {result.tolist()}; the sum is {right.tolist()}."
                    f"{whose(result, inputs)}"
                )
        if most > rounds:
            yield (
                f"with {size} ranks, the sum is right, but a rank sends {most} messages. {rounds} are enough: in every "
                "round, each rank knows the sum of twice as many."
            )
        elif in_a_row > rounds:
            yield (
                f"with {size} ranks, the sum is right, but {in_a_row} messages come one after the other. {rounds} "
                "would do, if in every round all ranks come to know the sum of twice as many, and not only some."
            )
        # Their sums depend on the order.
        fractions = torch.tensor([[random.random() for _ in range(100)] for _ in range(size)])
        results = on_peers(size, lambda peer: answer(peer, fractions[peer.number].clone()))[1]
        other = next((rank for rank, result in enumerate(results) if not torch.equal(result, results[0])), None)
        if other is not None:
            yield (
                f"with {size} ranks, ranks 0 and {other} end with sums that differ in their last bits: they have added "
                "in different orders. Two ranks that swap add the same two tensors."
            )


def whose(result: torch.Tensor, inputs: list[torch.Tensor]) -> str:
    """A sentence that says whose numbers have been added up, if it is only some of them."""
    for some in range(1, 2 ** len(inputs) - 1):
        ranks = [rank for rank in range(len(inputs)) if some >> rank & 1]
        if torch.equal(result, torch.stack([inputs[rank] for rank in ranks]).sum(dim=0)):
            numbers = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {' and '.join(map(str, ranks))}"
            return f" That is what {numbers} gave, and nothing else."
    return ""


@exercise(3, "With more ranks than KV heads, another rank saves weights, but no cache.")
def check_kv_heads(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    cases = [(9, 3, 3), (9, 3, 9), (64, 8, 8), (64, 8, 16), (8, 8, 2), (12, 2, 6)]
    for _ in range(6):
        num_kv_heads, sharing = random.choice([1, 2, 3, 4, 8]), random.choice([1, 2, 4, 6])
        num_heads = num_kv_heads * sharing
        sizes = [n for n in range(1, num_heads + 1) if num_heads % n == 0 and fits(n, num_kv_heads)]
        cases.append((num_heads, num_kv_heads, random.choice(sizes)))
    for num_heads, num_kv_heads, size in cases:
        for rank in range(size):
            each, sharing = num_heads // size, num_heads // num_kv_heads
            heads = range(rank * each, (rank + 1) * each)
            right = sorted({head // sharing for head in heads})
            got = list(attempted(answer(rank, size, num_heads, num_kv_heads)))
            if got == right:
                continue
            case = (
                f"{num_heads} query heads share {num_kv_heads} KV heads, on {size} ranks. Rank {rank} has query heads "
            )
            case += f"{heads[0]} to {heads[-1]}" if each > 1 else f"{heads[0]} alone"
            said = f"{case}; these read KV heads {right}, and you return {got}."
            if not got:
                said += " A rank without keys cannot compute attention: when there are too few, they are copied."
            elif len(got) > len(right):
                said += " It holds some that nobody reads there."
            yield said


def fits(size: int, num_kv_heads: int) -> bool:
    """Whether one number divides the other."""
    return num_kv_heads % size == 0 or size % num_kv_heads == 0


class VocabularyRank:
    """A rank's logits, which it keeps to itself; it tells its best ones. `start`: the first token id of its part."""

    def __init__(self, start: int, logits: torch.Tensor) -> None:
        self.start, self._logits = start, logits
        self.num_told = 0  # at most, in one call: who asks for more and more hears the same ones again

    def __len__(self) -> int:
        return len(self._logits)

    def topk(self, k: int) -> tuple[list[float], list[int]]:
        """The `k` highest logits, highest first, and where they stand *in this rank's part*."""
        self.num_told = max(self.num_told, k)
        values, places = self._logits.topk(k)
        return values.tolist(), places.tolist()


@exercise(4, "A few numbers from each rank in the place of its whole part of the vocabulary.")
def check_top_k(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    for size, crowded in ((3, True), (2, False), (4, False), (random.randint(2, 6), True)):
        widths = [random.randint(20, 40) for _ in range(size)]
        starts = [sum(widths[:i]) for i in range(size)]
        logits = torch.tensor(random.sample(range(1000), sum(widths))).float() / 10
        k = random.randint(3, 6)
        if crowded:  # all of the best stand on one rank
            i = random.randrange(size)
            logits[starts[i] : starts[i] + k] += 100
        ranks = [VocabularyRank(start, logits[start : start + wide]) for start, wide in zip(starts, widths)]
        right = logits.topk(k).indices.tolist()
        got = attempted(answer(ranks, k))
        case = f"{size} ranks, whose parts begin at {starts}, k = {k}"
        told = max(rank.num_told for rank in ranks)
        locals_ = [place for rank in ranks for place in rank._logits.topk(min(k, len(rank))).indices.tolist()]
        if list(got) == right and told <= k:
            continue
        if list(got) == right:
            yield f"{case}: right, but you ask a rank for {told} logits. Nobody needs more than its {k} best."
        elif sorted(got) == sorted(right):
            yield f"{case}: the right tokens, {right}, but not with the highest logit first: {list(got)}."
        elif len(got) != k:
            yield f"{case}: you return {len(got)} tokens."
        elif told < k:
            yield (
                f"{case}: you ask no rank for more than {told}, and return {list(got)}; the best are {right}. All of "
                "the best may stand on one rank."
            )
        elif all(token in locals_ for token in got) and any(start > 0 for start in starts):
            yield f"{case}: you return {list(got)}, and the best are {right}. A place in a rank's part is no token id."
        else:
            yield f"{case}: you return {list(got)}, and the best are {right}."
