"""What chapter 02 shares: a look into attention, maps of a row of slots, exercise checks."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.trace import Trace
from nanovllm.kernels import torch_attention
from nanovllm.layers.attention import Attention
from nanovllm.lessons.checks import attempted, exercise
from nanovllm.lessons.example import PROMPTS
from nanovllm.utils.context import Context, get_context
from nanovllm.viz.theme import EMPTY, INK, QUIET, colour, hatch, ink_on, new_figure, styled

# -- A look into attention ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer's attention was given in a step, and what it made of it; copies, on the CPU.

    `query` and `output` are `[num_tokens, num_heads, head_dim]`, `key` and `value` `[num_tokens, num_kv_heads,
    head_dim]`; the caches are `[blocks, block_size, num_kv_heads, head_dim]` and hold the step's keys and values.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    context: Context
    scale: float
    output: torch.Tensor


@contextmanager
def watch_attention(llm: LLM, layer: int = 0) -> Iterator[list[AttentionCall]]:
    """Record what a layer's attention does, one `AttentionCall` a step, for the duration of a `with` block."""
    attentions = [module for module in llm.engine.model_runner.model.modules() if isinstance(module, Attention)]
    calls: list[AttentionCall] = []

    def record(module: Attention, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        query, key, value, k_cache, v_cache = map(kept, (*args, module.k_cache, module.v_cache))
        context = replace(get_context(), plan=None)
        for name in ("query_start", "context_lens", "block_tables", "slot_mapping"):
            setattr(context, name, kept(getattr(context, name)))
        output = kept(output).unflatten(1, (module.num_heads, module.head_dim))
        calls.append(AttentionCall(query, key, value, k_cache, v_cache, context, module.scale, output))

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone().cpu()

    hook = attentions[layer].register_forward_hook(record)  # type: ignore[arg-type]
    try:
        yield calls
    finally:
        hook.remove()


def made_up_decodes(context_lens: list[int], seed: int = 0) -> AttentionCall:
    """A step that no model made: a decode for each context length, with random numbers in blocks that lie anywhere."""
    numbers = torch.Generator().manual_seed(seed)
    n, block_size, num_heads, num_kv_heads, head_dim = len(context_lens), 16, 9, 3, 64
    num_blocks = [-(-context_len // block_size) for context_len in context_lens]
    blocks = torch.randperm(sum(num_blocks), generator=numbers).to(torch.int32).split(num_blocks)
    tables = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True)
    k_cache, v_cache = torch.randn(2, sum(num_blocks), block_size, num_kv_heads, head_dim, generator=numbers)
    lens, rows = torch.tensor(context_lens, dtype=torch.int32), torch.arange(n)
    last = lens.long() - 1
    slots = tables[rows, last // block_size].long() * block_size + last % block_size
    context = Context(block_size, n, torch.arange(n + 1, dtype=torch.int32), lens, tables, slots)
    query = torch.randn(n, num_heads, head_dim, generator=numbers)
    context.plan = torch_attention.plan(context, k_cache)
    scale = head_dim**-0.5
    output = torch_attention.attend(query, k_cache, v_cache, context, scale)
    key, value = (cache.flatten(0, 1)[slots] for cache in (k_cache, v_cache))
    return AttentionCall(query, key, value, k_cache, v_cache, context, scale, output)


def alone(call: AttentionCall, i: int) -> AttentionCall:
    """The step as it would be with its decode `i` alone."""
    here, context = slice(i, i + 1), call.context
    context = replace(
        context,
        num_decodes=1,
        query_start=context.query_start[:2],
        context_lens=context.context_lens[here],
        block_tables=context.block_tables[here],
        slot_mapping=None,  # its keys and values are there already
        plan=None,
    )
    query, key, value, output = (t[here] for t in (call.query, call.key, call.value, call.output))
    return replace(call, query=query, key=key, value=value, context=context, output=output)


# -- What the programs of a Triton kernel read -------------------------------------------------------------------------

Program = tuple[int, int, int]  # its number in each direction of the grid


@contextmanager
def watch_programs(cache: torch.Tensor) -> Iterator[dict[Program, list[int]]]:
    """Record the slots of `cache` that each program of a kernel reads, for the duration of a `with` block.

    For Triton's interpreter, on a CPU. A slot is there once for each tile in which a program reads it.
    """
    from triton.runtime.interpreter import interpreter_builder  # there is no Triton outside Linux

    reads: dict[Program, list[int]] = {}
    load = interpreter_builder.create_masked_load
    start, slot_bytes = cache.data_ptr(), cache.stride(1) * cache.element_size()

    def record(pointers: Any, mask: Any, *args: Any) -> Any:
        slots = np.unique((pointers.data[mask.data] - np.uint64(start)) // np.uint64(slot_bytes))
        slots = slots[slots < cache.size(0) * cache.size(1)]  # what lies before the cache is far beyond it: unsigned
        if slots.size:
            reads.setdefault(tuple(interpreter_builder.grid_idx), []).extend(slots.tolist())
        return load(pointers, mask, *args)

    interpreter_builder.create_masked_load = record
    try:
        yield reads
    finally:
        interpreter_builder.create_masked_load = load


def what_programs_read(
    call: AttentionCall, reads: Mapping[Program, list[int]], names: str
) -> dict[Program, tuple[str, range]]:
    """Whose context each program reads, and which positions of it; `names` are those of the step's requests."""
    size = call.context.block_size
    owner = {
        block * size + offset: (name, i * size + offset)
        for name, table, context_len in zip(names, call.context.block_tables.tolist(), call.context.context_lens)
        for i, block in enumerate(table[: -(-int(context_len) // size)])
        for offset in range(size)
    }
    found = {}
    for program, slots in sorted(reads.items()):
        owners, positions = zip(*(owner[slot] for slot in slots))
        assert len(set(owners)) == 1 and sorted(positions) == list(range(min(positions), max(positions) + 1))
        found[program] = owners[0], range(min(positions), max(positions) + 1)
    return found


def draw_programs(panels: Mapping[str, Mapping[str, list[range]]]) -> Figure:
    """Panels side by side. A line's label begins with the name of a request; each of its ranges is a program."""
    figure = new_figure(9, 3.4)
    with styled():
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (title, lines) in zip(axes, panels.items()):
            end = max(positions.stop for programs in lines.values() for positions in programs)
            for y, (label, programs) in enumerate(lines.items()):
                face, ink = colour(label), ink_on(colour(label))
                plate = dict(boxstyle="round,pad=0.15", facecolor=face, edgecolor="none")
                for positions in programs:
                    box = Rectangle((positions.start, y - 0.42), len(positions), 0.84)
                    box.set(facecolor=face, hatch=hatch(label), edgecolor="white", linewidth=1.5)
                    ax.add_patch(box)
                    if len(positions) > end / 12:  # there is room for the number inside
                        middle = (positions.start + positions.stop) / 2
                        text = ax.text(middle, y, f"{len(positions)}", ha="center", color=ink, bbox=plate)
                    else:
                        text = ax.text(positions.stop, y, f" {len(positions)}", ha="left")
                    text.set(va="center", fontsize=7.5)
            ax.set(xlim=(0, end), ylim=(len(lines) - 0.4, -0.6))
            ax.set_yticks(range(len(lines)), list(lines), fontsize=8.5)
            ax.tick_params(axis="y", length=0)
            ax.set_title(title, fontsize=10)
            ax.set_xlabel("position of the keys that are read")
    return figure


def programs_alt(panels: Mapping[str, Mapping[str, list[range]]]) -> str:
    """What is seen there, in words: the positions that every program reads, first to last."""
    lines = {label: programs for panel in panels.values() for label, programs in panel.items()}
    return "; ".join(
        f"{label}: {', '.join(f'{p.start}-{p.stop - 1}' for p in programs)}" for label, programs in lines.items()
    )


# -- Maps of a row of slots --------------------------------------------------------------------------------------------

NEVER, FREE = "x", "."


def slot_map(
    slots: Mapping[str, Iterable[int]], stored: Mapping[str, int], final: Mapping[str, int], num_slots: int
) -> str:
    """A row of slots as characters, one a slot.

    `A` holds a token of request A, `a` is held for a token that A will have later, `x` is held by the request to the
    left and will never be used, `.` is free.

    Args:
        slots: the slots that each request holds, in the order in which it fills them.
        stored: how many tokens of each request the cache holds.
        final: how many it will hold in the end.
    """
    row = [FREE] * num_slots
    for name, held in slots.items():
        for i, slot in enumerate(held):
            row[slot] = name if i < stored[name] else name.lower() if i < final[name] else NEVER
    return "".join(row)


def draw_slots(rows: Mapping[str, str]) -> Figure:
    """Rows of slots, each with its title, as `slot_map` tells them."""
    figure = new_figure(9, 0.95 * len(rows) + 0.75)
    with styled():
        axes = figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0]
        for ax, (title, row) in zip(axes, rows.items()):
            draw_row(ax, row)
            ax.set_title(title, fontsize=10)
            ax.set(xlim=(0, len(row)), ylim=(0, 1), yticks=[])
            ax.set_xticks(range(0, len(row) + 1, 16))
            ax.spines["left"].set_visible(False)
        axes[-1].set_xlabel("slot")
        handles = [
            Patch(facecolor=QUIET, label="holds a token"),
            Patch(facecolor=QUIET, alpha=0.3, label="reserved: a token comes later"),
            Patch(facecolor="white", edgecolor=QUIET, hatch="xxx", label="held, and never used"),
            Patch(facecolor=EMPTY, edgecolor=QUIET, label="free"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8.5)
    return figure


def draw_row(ax: Any, row: str) -> None:
    """Runs of equal characters as boxes."""
    start, owner = 0, "A"
    for kind, run in groupby(row):
        length = len(list(run))
        box: dict[str, Any] = dict(linewidth=0)
        if kind == FREE:
            box.update(facecolor=EMPTY)
        elif kind == NEVER:
            box.update(facecolor="white", edgecolor=colour(owner), hatch="xxx")
        else:
            owner = kind.upper()
            box.update(facecolor=colour(owner), alpha=1 if kind.isupper() else 0.3)
            if kind.isupper():
                box.update(edgecolor="white", hatch=hatch(owner))
        ax.add_patch(Rectangle((start, 0), length, 1, **box))
        ax.add_patch(Rectangle((start, 0), length, 1, facecolor="none", edgecolor="white", linewidth=0.8))
        if kind.isalpha() and kind != NEVER and length > 2:
            ink = ink_on(colour(owner)) if kind.isupper() else INK
            plate = (
                dict(boxstyle="round,pad=0.15", facecolor=colour(owner), edgecolor="none") if kind.isupper() else None
            )
            ax.text(start + length / 2, 0.48, kind, ha="center", va="center", fontweight="bold", color=ink, bbox=plate)
        start += length


def blocks_as_slots(trace: Trace, index: int, names: Mapping[int, str]) -> dict[str, list[int]]:
    """The slots that each request holds after a step, from its block table."""
    size = trace.block_size
    return {
        names[request]: [block * size + offset for block in table for offset in range(size)]
        for request, table in trace.block_tables_at(index).items()
    }


def draw_memory() -> Figure:
    """The same four requests in the same memory after six steps: each with room for the longest, and in blocks."""
    llm = LLM(dtype="float32", num_kv_blocks=8, enable_prefix_caching=False)
    with llm.trace() as trace:
        llm.generate(list(PROMPTS.values()), SamplingParams(temperature=0, max_tokens=16, stop="\n"), use_tqdm=False)
    names = dict(zip(trace.requests, PROMPTS))
    final = {names[r.id]: len(r.prompt_token_ids) + len(r.output_token_ids) - 1 for r in trace.requests.values()}
    num_steps = 6
    stored = {names[r.id]: len(r.prompt_token_ids) + num_steps - 1 for r in trace.requests.values()}
    alone = slot_map({"A": range(64), "B": range(64, 128)}, stored, final, 128)
    paged = slot_map(blocks_as_slots(trace, num_steps - 1, names), stored, final, 128)
    waiting = "A piece for the longest possible answer: C and D wait, although half of the memory is empty"
    return draw_slots(
        {waiting: alone, "Blocks of 16, taken when needed: all of them run, and D is done already": paged}
    )


# -- Exercise checks ---------------------------------------------------------------------------------------------------


@exercise(1, "Every engine with a block table has this line in it, in one language or another.")
def check_slots_of_step(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    cases = [([5, 2, 7], 0, 20, 16), ([5, 2, 7], 33, 1, 16)]
    for _ in range(10):
        block_size = random.choice([1, 4, 16, 32])
        num_tokens = random.randint(1, 5 * block_size)
        num_new = random.randint(1, num_tokens)
        table = random.sample(range(100), -(-num_tokens // block_size))
        cases.append((table, num_tokens - num_new, num_new, block_size))
    for table, num_computed, num_new, block_size in cases:
        positions = range(num_computed, num_computed + num_new)
        right = [table[p // block_size] * block_size + p % block_size for p in positions]
        got = [int(slot) for slot in attempted(answer(table, num_computed, num_new, block_size))]
        case = f"block table {table}, {num_computed} tokens computed, {num_new} new, blocks of {block_size}"
        if got == right:
            continue
        if got == list(positions):
            yield f"with {case} you return the positions in the sequence. The block table says where they lie."
        elif len(got) != num_new:
            yield f"with {case} you return {len(got)} slots: one is needed for each *new* token."
        elif got == [table[p // block_size] * block_size + p % block_size for p in range(num_new)]:
            yield f"with {case} you begin at position 0, but the first new token stands at position {num_computed}."
        else:
            yield f"with {case} the engine writes to {shortened(right)}, and you to {shortened(got)}."


def shortened(slots: list[int]) -> str:
    return str(slots) if len(slots) <= 6 else f"{str(slots[:6])[:-1]}, …]"


@exercise(2, "Half a block for each sequence, on average: that is all that paging wastes.")
def check_waste(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    cases = [([16, 32], 16), ([27, 27, 40, 5], 16)]
    cases += [([random.randint(1, 300) for _ in range(random.randint(1, 9))], random.choice([1, 4, 16, 64]))]
    for stored, block_size in cases:
        blocks = [-(-n // block_size) for n in stored]
        right = 1 - sum(stored) / (sum(blocks) * block_size)
        got = attempted(answer(stored, block_size))
        case = f"sequences of {stored} tokens in blocks of {block_size}"
        one_more = 1 - sum(stored) / (sum(n // block_size + 1 for n in stored) * block_size)
        if abs(got - right) < 1e-9:
            continue
        if abs(got - one_more) < 1e-9:
            yield f"for {case} you return {got:.3f}: a sequence that fills its last block exactly needs no other."
        elif got == sum(blocks) * block_size - sum(stored):
            yield f"for {case} you return {got} slots; divide by all slots that are held."
        else:
            yield f"for {case} the share is {right:.3f}, and you return {got:.3f}."


class SharedPool:
    """A pool of blocks that several block tables may share, for exercise 3. It stores tokens in the place of K/V."""

    def __init__(self, num_blocks: int = 64, block_size: int = 4) -> None:
        self.block_size = block_size
        self.contents: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.ref_count = [0] * num_blocks
        self.free = list(range(num_blocks))

    def take(self) -> int:
        """A free block, with one holder."""
        block = self.free.pop(0)
        self.ref_count[block] = 1
        return block

    def fork(self, block_table: list[int]) -> list[int]:
        """The block table of a second sequence that begins with all that the first has stored."""
        for block in block_table:
            self.ref_count[block] += 1
        return list(block_table)

    def three(self, prompt: list[int]) -> dict[str, list[int]]:
        """The block tables of A, B and C, who share a prompt."""
        first = [self.take() for _ in range(-(-len(prompt) // self.block_size))]
        for i, token in enumerate(prompt):
            self.contents[first[i // self.block_size]][i % self.block_size] = token
        return {"A": first, "B": self.fork(first), "C": self.fork(first)}

    def read(self, block_table: list[int], num_tokens: int) -> list[int | None]:
        return [token for block in block_table for token in self.contents[block]][:num_tokens]


@exercise(3, "This is copy-on-write: one block is copied, at the last moment, and only by those who must.")
def check_append(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    for num_prompt_tokens in (6, 8, random.randint(1, 30)):
        pool, reference = SharedPool(), SharedPool()
        prompt = [random.randrange(100, 900) for _ in range(num_prompt_tokens)]
        tables, others, tokens = pool.three(prompt), reference.three(prompt), {name: list(prompt) for name in "ABC"}
        for _ in range(30):
            name, token = random.choice("ABC"), random.randrange(1000)
            before = copy.deepcopy((pool.contents, tables))
            returned = answer(pool, tables[name], len(tokens[name]), token)
            if before == (pool.contents, tables):
                attempted(returned)
            append(reference, others[name], len(tokens[name]), token)
            tokens[name].append(token)
            case = (
                f"A, B and C share a prompt of {num_prompt_tokens} tokens in blocks of 4. {name} writes its position "
                f"{len(tokens[name]) - 1}"
            )
            yield from complaints_about_pool(pool, tables, tokens, name, case)
            taken, needed = (len(p.ref_count) - len(p.free) for p in (pool, reference))
            if taken > needed:
                yield f"{case}: {taken} blocks are taken, {needed} would do. Copy only what somebody else reads, too."


def complaints_about_pool(
    pool: SharedPool, tables: dict[str, list[int]], tokens: dict[str, list[int]], name: str, case: str
) -> Iterator[str]:
    """What is wrong after `name` has written its last token."""
    for other in tables:
        if pool.read(tables[other], len(tokens[other])) != tokens[other]:
            if other == name:
                yield f"{case}, and does not find its own tokens again. Is the content copied, and the table changed?"
            yield f"{case}, and changes what {other} reads: it must not write to a block that {other} holds, too."
    for block, count in enumerate(pool.ref_count):
        holders = sum(block in table for table in tables.values())
        if count != holders:
            yield (
                f"{case}. Block {block} is in {holders} block tables, but its ref_count says {count}: who takes a copy "
                "does not hold the old block any longer."
            )


def append(pool: SharedPool, block_table: list[int], position: int, token: int) -> None:
    """What exercise 3 asks for."""
    index, offset = divmod(position, pool.block_size)
    if index == len(block_table):
        block_table.append(pool.take())
    elif pool.ref_count[block_table[index]] > 1:
        copied, block_table[index] = block_table[index], pool.take()
        pool.ref_count[copied] -= 1
        pool.contents[block_table[index]] = list(pool.contents[copied])
    pool.contents[block_table[index]][offset] = token


@exercise(4, "No request ever loses its blocks, and the memory pays for it: blocks stand empty until they are needed.")
def check_reserving(answer: Any, random: random.Random) -> Iterator[str]:
    policy = attempted(answer)
    if not (isinstance(policy, type) and issubclass(policy, Scheduler)):
        yield "give the class, a subclass of `Scheduler`, not an object of it."
        return
    cases = [[(16, 17), (16, 17), (16, 17), (16, 17)]]  # 32 tokens each are stored: two of them fill four blocks
    cases += [[(random.randint(1, 40), random.randint(1, 24)) for _ in range(10)] for _ in range(3)]
    for case in cases:
        num_blocks = 4 if case is cases[0] else random.randint(5, 12)
        scheduler = policy(Config(max_num_batched_tokens=64), BlockManager(num_blocks, 16, enable_prefix_caching=False))
        for i, lengths in enumerate(case):
            scheduler.add(make_sequence(i, *lengths))
        yield from complaints_about_policy(scheduler, f"with {num_blocks} blocks and (prompt, answer) {case}")


def complaints_about_policy(scheduler: Scheduler, case: str) -> Iterator[str]:
    blocks = scheduler.block_manager
    while scheduler.has_work():
        batch = scheduler.schedule()
        needs = {s.id: blocks.num_blocks_for(s.max_num_tokens - 1) for s in [*scheduler.running, *scheduler.waiting]}
        reserved = sum(needs[seq.id] for seq in scheduler.running)
        head = needs[scheduler.waiting[0].id] if scheduler.waiting else blocks.num_blocks + 1
        if batch.preempted:
            victim = batch.preempted[0].id
            yield f"{case} request {victim} is preempted. Count the blocks that each will need in the *end*."
        if not batch.scheduled:
            yield f"{case} nobody runs, and {len(scheduler.waiting)} wait for ever. `_admit` must say True to some."
        if batch.num_tokens < 64 and reserved + head <= blocks.num_blocks:
            yield (
                f"{case} request {scheduler.waiting[0].id} waits, although it needs {head} blocks in the end, those "
                f"who run {reserved}. (The last token of an answer is never stored.)"
            )
        scheduler.update(batch, [7] * sum(s.samples for s in batch.scheduled))


def make_sequence(id: int, num_prompt_tokens: int, num_answer_tokens: int) -> Sequence:
    """A request of the given lengths, for a scheduler that runs without a model."""
    params = SamplingParams(max_tokens=num_answer_tokens, ignore_eos=True)
    return Sequence(id, [id] * num_prompt_tokens, params, num_prompt_tokens + num_answer_tokens)
