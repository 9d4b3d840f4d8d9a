"""What chapter 03 shares: pictures of what is shared, customers of four services, exercise checks."""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine.block_manager import Block, BlockManager
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.trace import Trace
from nanovllm.lessons.checks import attempted, exercise
from nanovllm.lessons.example import PROMPTS
from nanovllm.lessons.tiny import tiny_llm
from nanovllm.viz.frames import Frames
from nanovllm.viz.theme import EMPTY, INK, QUIET, colour, hatch, ink_on, new_figure, styled

# -- Pictures ----------------------------------------------------------------------------------------------------------


def draw_differences(panels: Mapping[str, torch.Tensor]) -> Figure:
    """Where keys differ: for each title a map of booleans, `[layers, tokens]`."""
    figure = new_figure(9, 2.9)
    with styled():
        for ax, (title, differs) in zip(
            figure.subplots(1, len(panels), sharey=True, squeeze=False)[0],
            panels.items(),
        ):
            num_layers, num_tokens = differs.shape
            ax.set_facecolor(EMPTY)
            for layer, position in differs.nonzero().tolist():
                ax.add_patch(
                    Rectangle(
                        (position, layer),
                        1,
                        1,
                        facecolor=colour("A"),
                        edgecolor="white",
                        linewidth=0.3,
                    )
                )
            ax.vlines(range(num_tokens + 1), 0, num_layers, color="white", linewidth=0.3)
            ax.vlines(range(0, num_tokens, 16), 0, num_layers, color=INK, linewidth=1)
            ax.set(
                xlim=(0, num_tokens),
                ylim=(num_layers, 0),
                title=title,
                xlabel="position (a line: a block begins)",
            )
            ax.set_xticks([0.5, 16.5, num_tokens - 0.5], [0, 16, num_tokens - 1])
            ax.set_yticks([0.5, num_layers - 0.5], [0, num_layers - 1])
            ax.set_ylabel("layer")
        handles = [Patch(facecolor=EMPTY, edgecolor=QUIET, label="equal keys")]
        handles.append(Patch(facecolor=colour("A"), label="other keys"))
        figure.legend(handles=handles, loc="outside right center")
    return figure


def draw_shared() -> Figure:
    """A and B in logical blocks, with their hashes, and the physical blocks that they lead to after one step."""
    llm = LLM(dtype="float32", num_kv_blocks=8)
    with llm.trace() as trace:
        llm.generate(
            [PROMPTS["A"], PROMPTS["B"]],
            SamplingParams(temperature=0, max_tokens=2),
            use_tqdm=False,
        )
    blocks, tables = trace.blocks_at(0), trace.block_tables_at(0)
    figure = new_figure(9, 3.6)
    with styled():
        ax = figure.subplots()
        for block in range(3):
            draw_physical_block(
                ax,
                block,
                ["AB"[owner] for owner in blocks[block].owners],
                blocks[block].filled / 16,
            )
        for row, request, name in ((2.1, 0, "A"), (-2.1, 1, "B")):
            token_ids = trace.requests[request].prompt_token_ids
            badge = dict(boxstyle="round,pad=0.25", facecolor=colour(name), edgecolor="none")
            ax.text(
                -0.45,
                row,
                name,
                ha="center",
                va="center",
                fontweight="bold",
                color=ink_on(colour(name)),
                bbox=badge,
            )
            for i, block in enumerate(tables[request]):
                text = "".join(trace.text_of(token_id) for token_id in token_ids[16 * i : 16 * i + 16])
                draw_logical_block(ax, LEFT[i], row, text, blocks[block].hash)
                lean = 0.28 * (1 if row > 0 else -1)
                start, end = (LEFT[i] + 2.4, row - 2.4 * lean), (
                    BLOCKS[block] + WIDTH / 2,
                    1.7 * lean,
                )
                style: dict[str, Any] = dict(arrowstyle="-|>", mutation_scale=13, linewidth=1.6, shrinkA=0, shrinkB=0)
                ax.add_patch(FancyArrowPatch(start, end, color=colour(name), zorder=3, **style))
        ax.text(-0.45, 0, "KV\ncache", ha="center", va="center", fontsize=9, color=QUIET)
        ax.set(xlim=(-0.9, 10.2), ylim=(-2.9, 2.9))
        ax.axis("off")
    return figure


LEFT = (0.0, 5.2)  # where the logical blocks of a row begin
BLOCKS = (1.625, 5.4, 7.9)  # and the physical ones
WIDTH = 1.55  # of a physical block


def draw_logical_block(ax: Axes, left: float, middle: float, text: str, known: int | None) -> None:
    """A box with the text of up to 16 tokens and, if it is full, the name: its hash."""
    ax.add_patch(Rectangle((left, middle - 0.62), 4.8, 1.24, facecolor="white", edgecolor=QUIET))
    lines = text.strip().replace(". ", ".\n").replace("\n\n", "\n")
    ax.text(left + 0.15, middle + 0.2, lines, va="center", fontsize=8.5, parse_math=False)
    about = "not full: no name yet" if known is None else f"name {known:016x}"
    style: dict[str, Any] = dict(color=QUIET) if known is None else dict(family="monospace", fontweight="bold")
    ax.text(left + 0.15, middle - 0.42, about, va="center", fontsize=8.5, **style)


def draw_physical_block(ax: Axes, number: int, owners: list[str], filled: float) -> None:
    """A band for each owner, as wide as the block is filled."""
    left, height = BLOCKS[number], 0.9 / len(owners)
    ax.add_patch(Rectangle((left, -0.45), WIDTH, 0.9, facecolor=EMPTY, edgecolor="none"))
    for k, name in enumerate(owners):
        low = 0.45 - (k + 1) * height
        style: dict[str, Any] = dict(facecolor=colour(name), edgecolor="white", hatch=hatch(name), linewidth=0)
        ax.add_patch(Rectangle((left, low), WIDTH * filled, height, **style))
    ax.add_patch(Rectangle((left, -0.45), WIDTH, 0.9, facecolor="none", edgecolor=INK))
    ax.text(left + WIDTH + 0.12, 0, f"block {number}", va="center", fontsize=9, color=INK)


class Turn(NamedTuple):
    """A request comes: what it finds, whose content must go for it, and whose each block holds after its first step."""

    name: str
    num_cached_tokens: int
    evicted: list[str]
    holds: dict[int, str]


def turns_of(frames: Frames) -> list[Turn]:
    """The requests of a run in the order in which they came; for runs in which nobody is preempted."""
    turns: list[Turn] = []
    holds: dict[int, str] = {}
    seen = set()
    for step in frames.trace.steps:
        evicted = [holds.pop(event.block) for event in step.block_events if event.kind == "evict"]
        for event in step.block_events:
            if event.kind == "cache" and event.request is not None:
                holds[event.block] = frames.name(event.request)
        for share in step.scheduled:
            if share.id not in seen:
                seen.add(share.id)
                turns.append(
                    Turn(
                        frames.name(share.id),
                        share.num_computed_tokens,
                        evicted,
                        dict(holds),
                    )
                )
    return turns


def turns_text(runs: Mapping[str, Frames]) -> str:
    """Who came, whose content was evicted for it, and how many tokens it found; a column for each turn."""
    lines = []
    for title, turns in ((title, turns_of(frames)) for title, frames in runs.items()):
        rows = {
            "came": [turn.name for turn in turns],
            "evicted": ["".join(turn.evicted) or "." for turn in turns],
            "found": [str(turn.num_cached_tokens) for turn in turns],
        }
        lines += [
            title,
            *(f"{what:8}" + "".join(f"{text:>3}" for text in texts) for what, texts in rows.items()),
        ]
    return "\n".join(lines)


def draw_turns(runs: Mapping[str, Frames]) -> Figure:
    """A column for each turn: who comes, and whose content each block holds then; new content has a bold outline."""
    figure = new_figure(9, 2.2 * len(runs))
    with styled():
        for ax, (title, frames) in zip(
            figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0],
            runs.items(),
        ):
            turns, num_blocks = turns_of(frames), frames.trace.num_blocks
            before: dict[int, str] = {}
            for column, turn in enumerate(turns):
                for block in range(num_blocks):
                    name = turn.holds.get(block, "")
                    draw_content(
                        ax,
                        column,
                        block,
                        name,
                        is_new=name not in ("", before.get(block)),
                    )
                words = f"{turn.name}\nfinds {turn.num_cached_tokens}"
                ax.text(column + 0.5, -0.12, words, ha="center", va="bottom", fontsize=8)
                before = turn.holds
            num_hits = sum(turn.num_cached_tokens > 0 for turn in turns)
            ax.set_title(f"{title}: {num_hits} of {len(turns)} find something", pad=32)
            ax.set(
                xlim=(0, max(len(turns_of(f)) for f in runs.values())),
                ylim=(num_blocks, 0),
                xticks=[],
            )
            ax.set_yticks(
                [i + 0.5 for i in range(num_blocks)],
                [f"block {i}" for i in range(num_blocks)],
            )
            ax.tick_params(length=0)
            ax.spines[["left", "bottom"]].set_visible(False)
    return figure


def draw_content(ax: Axes, column: int, block: int, name: str, is_new: bool) -> None:
    """Whose content a block holds in a turn: nobody's if `name` is empty."""
    face: dict[str, Any] = dict(facecolor=colour(name), hatch=hatch(name)) if name else dict(facecolor=EMPTY)
    place = (column + 0.04, block + 0.06), 0.92, 0.88
    ax.add_patch(Rectangle(*place, edgecolor="white", linewidth=0, **face))
    if name:
        plate = dict(boxstyle="round,pad=0.15", facecolor=colour(name), edgecolor="none")
        style: dict[str, Any] = dict(fontsize=8, fontweight="bold", color=ink_on(colour(name)), bbox=plate)
        ax.text(column + 0.5, block + 0.5, name, ha="center", va="center", **style)
    if is_new:
        ax.add_patch(Rectangle(*place, facecolor="none", edgecolor=INK, linewidth=2.2))


# -- Runs without a model ----------------------------------------------------------------------------------------------


def queue_at(trace: Trace, index: int) -> list[int]:
    """The queue of free blocks after a step, next to be taken first."""
    places = {block.free_index: i for i, block in enumerate(trace.blocks_at(index)) if block.free_index is not None}
    return [places[place] for place in sorted(places)]


def serve_customers(system_prompt: int, block_size: int, order: str, pool: int) -> tuple[int, int]:
    """Four services with a system prompt each, six customers a service, one at a time, in a pool of so many slots.

    The real scheduler and block manager decide; there is no model. Returns how many prompt tokens were found in the
    cache, and how many there were.
    """
    draw = random.Random(0)
    services = [service for service in range(4) for _ in range(6)]  # one after another
    if order == "in turn":
        services = list(range(4)) * 6
    elif order == "shuffled":
        draw.shuffle(services)
    questions = [[draw.randrange(10, 50_000) for _ in range(20)] for _ in services]
    prompts = [[service] * system_prompt + question for service, question in zip(services, questions)]
    return serve(Scheduler, prompts, BlockManager(pool // block_size, block_size))[0], sum(map(len, prompts))


def serve(policy: Callable[..., Scheduler], prompts: list[list[int]], blocks: BlockManager) -> tuple[int, int]:
    """Serve prompts one at a time. Returns the tokens found in the cache, and how many requests were left unserved."""
    scheduler = policy(Config(max_num_seqs=1), blocks)
    seqs = [make_sequence(i, prompt) for i, prompt in enumerate(prompts)]
    for seq in seqs:
        scheduler.add(seq)
    for _ in range(10 * len(seqs)):
        if scheduler.has_work():
            batch = scheduler.schedule()
            scheduler.update(batch, [7] * sum(s.samples for s in batch.scheduled))
    return sum(seq.num_cached_tokens or 0 for seq in seqs), sum(not seq.is_finished for seq in seqs)


def make_sequence(id: int, prompt: list[int], salt: str | None = None) -> Sequence:
    """A request for one token, for a block manager or a scheduler that runs without a model."""
    return Sequence(
        id,
        prompt,
        SamplingParams(max_tokens=1, ignore_eos=True, cache_salt=salt),
        len(prompt) + 1,
    )


# -- Exercise checks ---------------------------------------------------------------------------------------------------


@exercise(1, "Whole blocks only, and never the last token: the rest is arithmetic.")
def check_tokens_to_compute(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    cases = [(27, 22, 16), (32, 32, 16), (33, 33, 16), (40, 32, 16), (40, 40, 64)]
    for _ in range(4):
        num_tokens, block_size = random.randint(1, 120), random.choice([4, 16, 32])
        num_shared = random.randint(0, num_tokens)
        cases += [(num_tokens, shared, block_size) for shared in (num_shared, num_shared // block_size * block_size)]
    for num_tokens, num_shared, block_size in cases:
        right = tokens_to_compute(num_tokens, num_shared, block_size)
        got = attempted(answer(num_tokens, num_shared, block_size))
        case = f"a prompt of {num_tokens} tokens, {num_shared} of them as in an earlier one, and blocks of {block_size}"
        if got == right:
            continue
        if got == num_tokens - num_shared // block_size * block_size:
            yield f"with {case} you return {got}, the engine computes {right}: the last token is always computed."
        elif got == num_tokens - max(num_shared - 1, 0) // block_size * block_size:
            yield (
                f"with {case} you return {got}, the engine computes {right}: it is the new prompt's last token that is "
                "always computed, not the last of those they share."
            )
        elif got == num_tokens - num_shared:
            yield f"with {case} you return {got}, the engine computes {right}: it shares whole blocks only."
        else:
            yield f"with {case} the engine computes {right} tokens, and you say {got}."


def tokens_to_compute(num_tokens: int, num_shared: int, block_size: int) -> int:
    """How many tokens the engine computes for a prompt that begins like one before it."""
    blocks = BlockManager(256, block_size)
    shared = [7] * num_shared
    for i, prompt in enumerate([shared + [8], shared + [9] * (num_tokens - num_shared)]):
        seq = make_sequence(i, prompt)
        num_hits = len(admit(blocks, seq))
        blocks.release(seq)
    return num_tokens - num_hits * block_size


@exercise(
    2,
    "A hash is where to look. What lies there is told by its tokens, and by what came before them.",
)
def check_holds(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    class Reader(WeakHash):
        def _holds(self, block_id: int, parent: int | str, tokens: bytes) -> bool:
            return bool(answer(self.blocks[block_id], parent, tokens))

    attempted(answer(Block(parent="", tokens=b"itself"), "", b"itself"))  # elsewhere None is a way to say no
    for _ in range(20):
        blocks, reference = Reader(64, 2), WeakHash(64, 2)
        written: dict[int, tuple[str, list[int]]] = {}  # block -> salt, and all tokens up to its end
        num_hits = num_right = 0
        for i in range(12):
            prompt = [random.choice([5, 6]) for _ in range(random.randint(3, 9))]
            salt = random.choice(["", "", "blue"])
            seq, other = (make_sequence(i, prompt, salt or None) for _ in range(2))
            case = f"a prompt {prompt}" + (f" with the salt {salt!r}" if salt else "")
            hits = admit(blocks, seq)
            for k, block_id in enumerate(hits):
                wanted = prompt[: 2 * (k + 1)]
                its_salt, its_tokens = written[block_id]
                if its_tokens[-2:] != wanted[-2:]:
                    yield f"{case} gets the block of the tokens {its_tokens[-2:]} for its own {wanted[-2:]}."
                if (its_salt, its_tokens) != (salt, wanted):
                    yield (
                        f"{case} gets a block with the right tokens {wanted[-2:]}, but they stood after another "
                        "beginning, or came with another salt. Compare the parent, too."
                    )
            for k, block_id in enumerate(seq.block_table):
                if k >= len(hits):
                    written[block_id] = salt, prompt[: 2 * (k + 1)]
            num_hits, num_right = num_hits + len(hits), num_right + len(admit(reference, other))
            blocks.release(seq)
            reference.release(other)
        if num_hits < num_right:
            yield f"in {num_right} cases a block could be shared, and you allow it in {num_hits} of them only."


class WeakHash(BlockManager):
    """The engine's block manager with a hash of two values: nearly everything collides."""

    def _hash(self, seq: Sequence, i: int) -> tuple[int, bytes]:
        hash, tokens = super()._hash(seq, i)
        return hash % 2, tokens


def admit(blocks: BlockManager, seq: Sequence) -> list[int]:
    """Give a sequence its hits and the rest of its blocks, and count its prompt as computed. Returns the hits."""
    hits = blocks.find(seq)
    blocks.share(seq, hits)
    blocks.allocate(seq, seq.num_tokens)
    blocks.fill(seq, seq.num_tokens - seq.num_computed_tokens)
    return hits


@exercise(
    3,
    "Nobody told you, and you know. Where the victim had a salt, there was nothing to see.",
)
def check_spy(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    for victim in ("plain", "plain", "salted", "elsewhere", "plain", "salted"):
        llm = tiny_llm(num_kv_blocks=64)
        template = [random.randrange(2, 500) for _ in range(random.choice([16, 20, 40]))]
        *candidates, other = (template + [word] * 16 + [3] for word in random.sample(range(2, 500), 6))
        secret = random.randrange(5)
        sent = other if victim == "elsewhere" else candidates[secret]
        wait(llm, sent, "red" if victim == "salted" else None)
        got = attempted_spy(answer(lambda prompt: wait(llm, prompt), list(candidates)))
        llm.close()
        case = f"five candidates that begin with the same {len(template)} tokens"
        if got in candidates:
            yield f"with {case} you return the prompt itself; return its index, a number from 0 to 4."
        elif victim == "elsewhere" and got is not None:
            yield (
                f"with {case} the victim had sent the template with another ending, none of the five, and you say "
                f"{got!r}. All five are equally fast: return None then."
            )
        elif victim == "salted" and got is not None:
            yield (
                f"with {case} the victim had a salt, so nothing can be known, and you say {got!r}. The first that you "
                "send pays for the template, and the others are all equally fast: return None then."
            )
        elif victim == "plain" and got != secret:
            yield (
                f"with {case} the victim had sent number {secret}, and you say {got!r}. They all have the template "
                "in common, so all but one are equally fast, or slow. Which one is faster than all others?"
            )


def wait(llm: LLM, prompt: list[int], salt: str | None = None) -> int:
    """Send a prompt; returns the time to its first token on a clock that counts: 2 ms for every token computed."""
    params = SamplingParams(temperature=0, max_tokens=1, cache_salt=salt)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    return 2 * (len(prompt) - output["num_cached_tokens"])


def attempted_spy(value: Any) -> Any:
    """In this exercise None is an answer, and the stub returns an ellipsis."""
    return None if value is None else attempted(value)


@exercise(
    4,
    "This is the idea of SGLang's cache-aware scheduling: the order of the requests is a part of the cache.",
)
def check_cache_aware(answer: Any, random: random.Random) -> Iterator[str]:
    policy = attempted(answer)
    if not (isinstance(policy, type) and issubclass(policy, Scheduler)):
        yield "give the class, a subclass of `Scheduler`, not an object of it."
        return
    for _ in range(4):
        beginnings = [[i] * 32 for i in range(4)]
        prompts = [[*random.choice(beginnings), 100 + i] for i in range(24)]
        pools = [BlockManager(5, 16) for _ in range(3)]
        before = [
            *beginnings[random.choice([1, 2])],
            99,
        ]  # neither the first nor the last, so sorting them is not enough
        for blocks in pools:
            serve(Scheduler, [before], blocks)
        policies: tuple[Any, ...] = (Scheduler, CacheAware, policy)
        (first, _), (best, _), (got, num_left) = (serve(p, prompts, blocks) for p, blocks in zip(policies, pools))
        case = f"of {33 * len(prompts)} prompt tokens, {first} are found in order of arrival, {best} in that asked for"
        if num_left:
            yield f"{num_left} of 24 requests are never answered. Is everybody still in `self.waiting`?"
        elif got <= first:
            yield f"{case}, and {got} with yours. Who has the most cached blocks *now* goes first."
        elif got < best:
            yield f"{case}, and {got} with yours. Look anew in every step, the first one, too: what is cached changes."


class CacheAware(Scheduler):
    """What exercise 4 asks for."""

    def schedule(self) -> Batch:
        by_hits = sorted(
            self.waiting,
            key=lambda seq: len(self.block_manager.find(seq)),
            reverse=True,
        )
        self.waiting.clear()
        self.waiting.extend(by_hits)
        return super().schedule()
