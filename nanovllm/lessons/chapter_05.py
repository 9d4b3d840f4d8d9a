"""What chapter 05 shares: a step's operators as a picture, a tape for CUDA graphs, padding, exercise checks."""

import os
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import combinations
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm import LLM
from nanovllm.bench.gpu import shared_workload
from nanovllm.config import Config
from nanovllm.engine import cuda_graphs
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.layers.attention import Attention
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Linear
from nanovllm.lessons.chapter_04 import play
from nanovllm.lessons.checks import attempted, exercise
from nanovllm.lessons.device import Device
from nanovllm.lessons.display import show
from nanovllm.lessons.launches import Launches, draw_launches, launches_of
from nanovllm.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP
from nanovllm.viz.theme import EMPTY, HATCHES, INK, MUTED, QUIET, new_figure, styled

# -- A step's operators ------------------------------------------------------------------------------------------------

KINDS: dict[type[nn.Module], str] = {  # the module that is running -> what its operators do
    RMSNorm: "sum and norm",
    Linear: "product",
    LlamaAttention: "rotation",
    Attention: "attention",
    LlamaMLP: "activation",
}


@dataclass(frozen=True, slots=True)
class Operator:
    """One call: in which layer (None: before or after them), in which part, and its name in PyTorch."""

    layer: int | None
    kind: str
    name: str


def is_view(op: Any) -> bool:
    """Whether an operator's result is another look at memory that there is: it computes nothing."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


class Watch(TorchDispatchMode):
    """Notes every operator that computes, and the modules that are running when it is called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        self.operators: list[Operator] = []
        self.layers: dict[nn.Module, int] = {}
        for module in model.modules():
            if isinstance(module, LlamaDecoderLayer):
                self.layers[module] = len(self.layers)
        self.hooks = [m.register_forward_pre_hook(lambda m, _: self.running.append(m)) for m in model.modules()]
        self.hooks += [m.register_forward_hook(lambda *_: self.ended()) for m in model.modules()]

    def ended(self) -> None:
        self.running.pop()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_view(op):
            layer = next((self.layers[m] for m in self.running if m in self.layers), None)
            running = self.running[-1] if self.running else None
            kind = next((kind for cls, kind in KINDS.items() if isinstance(running, cls)), "other")
            self.operators.append(Operator(layer, kind, op._schema.name))
        return op(*args, **(kwargs or {}))


def operators_of_step(llm: LLM) -> list[Operator]:
    """Make one step, and return its operators in order. Views are left out."""
    watch = Watch(llm.engine.model_runner.model)
    with watch:
        llm.step()
    for hook in watch.hooks:
        hook.remove()
    return watch.operators


def draw_operators(operators: Sequence[Operator]) -> Figure:
    """A row for each layer, a box for each operator in it; before and after the layers a row each."""
    first = next(i for i, operator in enumerate(operators) if operator.layer is not None)
    rows: dict[str, list[Operator]] = {"before": [], "after": []}
    for i, operator in enumerate(operators):
        outside = "before" if i < first else "after"
        rows.setdefault(outside if operator.layer is None else str(operator.layer), []).append(operator)
    rows["after"] = rows.pop("after")  # the last row
    kinds = list(dict.fromkeys([*KINDS.values(), "other"]))
    look = {kind: (MUTED[i], HATCHES[i]) for i, kind in enumerate(kinds)}
    figure = new_figure(9, 0.125 * len(rows) + 0.9)
    with styled():
        ax = figure.subplots()
        for y, (_, found) in enumerate(rows.items()):
            for x, operator in enumerate(found):
                face, hatch = look[operator.kind]
                style: dict[str, Any] = dict(facecolor=face, hatch=hatch, edgecolor="white", linewidth=0.5)
                ax.add_patch(Rectangle((x, y - 0.42), 1, 0.84, **style))
        ax.set(xlim=(0, max(map(len, rows.values()))), ylim=(len(rows) - 0.4, -0.6))
        named = [i for i, name in enumerate(rows) if not name.isdigit() or int(name) % 5 == 0]
        labels = [f"layer {name}" if name.isdigit() else name for name in rows]
        ax.set_yticks(named, [labels[i] for i in named], fontsize=8.5)
        ax.set_xlabel("operators, in the order in which Python calls them")
        ax.tick_params(length=0)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        handles = [Patch(facecolor=c, hatch=h, edgecolor="white", label=kind) for kind, (c, h) in look.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=9)
    return figure


def names_from_profiler(work: Callable[[], Any]) -> list[str]:
    """The name of each call that PyTorch's profiler sees while some work is done.

    Some releases of PyTorch say on stderr, from C++, that the profiler starts; no notebook needs that.
    """
    with open(os.devnull, "w") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                work()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
    return [event.name for event in profiler.events()]


# -- The opening picture: a queue that runs empty ----------------------------------------------------------------------


def record_launches(num_layers: int = 8, size: int = 64) -> dict[str, Launches]:
    """The chapter's small network on the device of `nanovllm.lessons.device`: the fastest of some runs, each way."""
    generator = torch.Generator().manual_seed(0)
    device = Device()
    for i in range(num_layers):
        device.put(f"up{i}", torch.randn(size, 2 * size, generator=generator) / 8)
        device.put(f"down{i}", torch.randn(2 * size, size, generator=generator) / 11)

    def forward(launch: Callable[..., None]) -> None:
        for i in range(num_layers):
            launch("mm", "h", "x", f"up{i}")
            launch("sigmoid", "g", "h")
            launch("mul", "a", "h", "g")
            launch("mm", "y", "a", f"down{i}")
            launch("add", "x", "x", "y")

    calls: list[tuple[str, ...]] = []
    forward(lambda *call: calls.append(call))
    device.load(calls)

    found = {}
    for num_rows in (1, 2048):
        x = torch.randn(num_rows, size, generator=generator) / 100
        device.put("x", x)
        forward(device.launch)  # the memory of these shapes is there from now on
        rows = f"{num_rows:,} row{'s' * (num_rows > 1)}"
        found[f"{rows}, launch by launch"] = device.fastest(lambda: forward(device.launch), x=x)
        found[f"{rows}, replayed"] = device.fastest(device.replay, x=x)
    device.close()
    return found


def draw_queue() -> Figure:
    """One row launch by launch and replayed, and many rows."""
    runs = record_launches()
    return draw_launches({name: run for name, run in runs.items() if name != "2,048 rows, replayed"}, "the device")


# -- A tape in the place of CUDA graphs --------------------------------------------------------------------------------


@contextmanager
def in_the_place_of_cuda_graphs(tape: Callable[[], Any]) -> Iterator[None]:
    """Inside, `StepGraphs` works on a CPU: what it takes for `torch.cuda.CUDAGraph` is a tape.

    A tape is a context manager that records, and it has `replay()`. The engine's own code is left as it is. Only what
    is about a GPU gives way: memory and streams, pinned memory, and the sampler's kernel, which becomes `argmax`.
    """

    @contextmanager
    def capturing(graph: Any, pool: Any, stream: Any) -> Iterator[None]:
        with graph:
            yield

    def greedy(logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return logits.argmax(dim=-1)

    parts: list[tuple[Any, str, Any]] = [
        (torch.cuda, "CUDAGraph", tape),
        (torch.cuda, "graph", capturing),
        (torch.cuda, "graph_pool_handle", lambda: None),
        (torch.cuda, "synchronize", lambda device=None: None),
        (cuda_graphs, "capture_stream", nullcontext),
        (cuda_graphs, "tqdm", lambda todo, **_: todo),
        (cuda_graphs, "pinned", torch.from_numpy),
    ]
    with ExitStack() as stack:
        for owner, name, value in parts:
            stack.enter_context(mock.patch.object(owner, name, value))
        sampler = {"nanovllm.kernels.triton_sampler": SimpleNamespace(sample=greedy)}
        stack.enter_context(mock.patch.dict(sys.modules, sampler))
        yield


def capture_graphs(llm: LLM) -> cuda_graphs.StepGraphs:
    """Let an engine capture its graphs now, as it does at its start on a GPU."""
    runner = llm.engine.model_runner
    runner.graphs = runner.capture_graphs(llm.engine.config, runner.block_tables.shape[1])
    return runner.graphs


@contextmanager
def watch_hidden_states(llm: LLM) -> Iterator[list[torch.Tensor]]:
    """Inside, a list grows by a copy of the hidden states of each step, `[num_tokens, hidden_size]`."""
    runner, states = llm.engine.model_runner, list[torch.Tensor]()
    sample = runner.sample

    def watching(inputs: Any, hidden_states: torch.Tensor) -> Any:
        states.append(hidden_states.clone())
        return sample(inputs, hidden_states)

    with mock.patch.object(runner, "sample", watching):
        yield states


# -- A recording made on a GPU -----------------------------------------------------------------------------------------


def show_recording(recording: dict[str, Any]) -> None:
    """The lanes of a GPU, what the graphs cost there, and where and when it was recorded."""
    runs = {name: Launches.from_dict(run) for name, run in recording["timelines"].items()}
    for n in dict.fromkeys(name.rpartition(" ")[2] for name in runs):
        pair = {}
        for kind, seconds in recording["seconds"].items():
            title = f"{kind}, batch {n}, {1000 * seconds[n]:.2f} ms without the profiler"
            pair[title] = runs[f"{kind}, batch {n}"]
        alt = "; ".join(f"{name}: {launches_of(run)}" for name, run in pair.items())
        show(draw_launches(pair, words=launches_of), "the grey in the GPU's lane, left of the dotted line.", alt=alt)
    print("\n".join(lines_of(recording)))


def lines_of(recording: dict[str, Any]) -> Iterator[str]:
    """A recording's numbers in words."""
    seconds, graphs = recording["seconds"], recording["graphs"]
    for n, replayed in seconds["graph"].items():
        eager = seconds["eager"][n]
        faster = f"{eager / replayed:.1f} times"
        yield f"batch {n:>3}: eager {1000 * eager:6.2f} ms, graph {1000 * replayed:6.2f} ms, {faster}"
    for name, run in recording["timelines"].items():
        kind, n = name.split(", batch ")
        computing = Launches.from_dict(run).computing
        yield f"{name}: its kernels take {1000 * computing:.2f} ms, {computing / seconds[kind][n]:.0%} of the step"
    number = f"{graphs['count']} graphs and {graphs['pieces']:,} pieces"
    yield f"{number}: {graphs['bytes'] / 1e6:.0f} MB, captured in {graphs['seconds']:.1f} s"
    yield "recorded: " + ", ".join(f"{name} {value}" for name, value in recording["about"].items())


# -- Buckets and padding -----------------------------------------------------------------------------------------------


def benchmark_sizes() -> list[int]:
    """Tokens of each step of the family's benchmark, as the engine's scheduler plans it with the GPU's settings."""
    prompts, answer_lens = shared_workload()
    requests = [(0, len(prompt), answer_len) for prompt, answer_len in zip(prompts, answer_lens)]
    config = Config(max_num_seqs=256, max_num_batched_tokens=16_384)
    scheduler = Scheduler(config, BlockManager(40_000, 16, enable_prefix_caching=False))
    return [batch.num_tokens for _, batch, _, _ in play(scheduler, requests)]


def draw_padding(runs: dict[str, list[tuple[int, int | None]]]) -> Figure:
    """Steps as bars: tokens, and on top of them the padding. A step without a bucket is cut off at the top."""
    figure = new_figure(9, 1.75 * len(runs) + 0.4)
    with styled():
        axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
        top = 1.15 * max(bucket or 1 for steps in runs.values() for _, bucket in steps)  # the same scale for all
        for ax, (title, steps) in zip(axes, runs.items()):
            draw_steps(ax, steps, top)
            ax.set_title(title, fontsize=10)
            ax.set_ylabel("rows")
        axes[-1].set_xlabel("step")
        handles = [
            Patch(facecolor=MUTED[0], label="tokens"),
            Patch(facecolor=MUTED[1], hatch=HATCHES[1], edgecolor="white", label="padding"),
        ]
        if any(bucket is None for steps in runs.values() for _, bucket in steps):
            handles.append(Patch(facecolor="white", edgecolor=INK, label="eager"))
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=9)
    return figure


def draw_steps(ax: Axes, steps: list[tuple[int, int | None]], top: float) -> None:
    for i, (num_tokens, bucket) in enumerate(steps):
        if bucket is None:
            ax.add_patch(Rectangle((i, 0), 0.9, top, facecolor="white", edgecolor=QUIET, linewidth=0.6))
            continue
        ax.add_patch(Rectangle((i, 0), 0.9, num_tokens, facecolor=MUTED[0], linewidth=0))
        padding: dict[str, Any] = dict(facecolor=MUTED[1], hatch=HATCHES[1], edgecolor="white", linewidth=0)
        ax.add_patch(Rectangle((i, num_tokens), 0.9, bucket - num_tokens, **padding))
    ax.set(xlim=(0, len(steps)), ylim=(0, top), facecolor=EMPTY)


# -- Exercise checks ---------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """The chapter's tape: operators with their arguments, and a replay into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for op, args, kwargs, result in self.calls:
            for kept, fresh in zip(tensors_in(result), tensors_in(op(*args, **kwargs))):
                if kept.data_ptr() != fresh.data_ptr():
                    kept.copy_(fresh)


def tensors_in(result: Any) -> list[torch.Tensor]:
    """The tensors in what an operator returned: one, several, or none."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors_in(part)] if isinstance(result, (tuple, list)) else []


@exercise(1, "With `None` the engine knows that this step must run without a graph.")
def check_bucket_of(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    cases = [(3, [1, 2, 4, 8]), (4, [1, 2, 4, 8]), (1, [1, 2, 4, 8]), (9, [1, 2, 4, 8]), (2, [8])]
    for _ in range(20):
        buckets = sorted(random.sample(range(1, 100), random.randint(1, 8)))
        cases.append((random.choice([*buckets, random.randint(1, 120)]), buckets))
    for num_tokens, buckets in cases:
        right = min((bucket for bucket in buckets if bucket >= num_tokens), default=None)
        try:
            got = answer(num_tokens, list(buckets))
        except IndexError:
            yield f"{num_tokens} tokens are more than the largest of {buckets} holds: return None, do not fail."
            return
        if got is Ellipsis:
            attempted(got)
        if got == right:
            continue
        case = f"for {num_tokens} token{'s' * (num_tokens > 1)} and the buckets {buckets} you return {got}"
        if right is None:
            yield f"{case}. None of them is large enough: return None."
        elif got is None:
            yield f"{case}. {right} is large enough."
        elif num_tokens in buckets and got > right:
            yield f"{case}. {num_tokens} fits exactly: no padding at all."
        elif got < num_tokens:
            yield f"{case}. {num_tokens} tokens do not fit into {got} rows."
        else:
            yield f"{case}. {right} is large enough, and would pad less."


@exercise(2, "Both sides of the question are computed, and the numbers choose.")
def check_at_most_one(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    generator = torch.Generator().manual_seed(random.randrange(1000))

    def draw(scale: float) -> torch.Tensor:
        x = torch.randn(3, 8, generator=generator)
        return x / x.abs().max() * scale

    def right(x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().max() if x.abs().max() > 1 else x

    for scale in (5.0, 0.5):
        if attempted(answer(draw(scale))).shape != (3, 8):
            yield "return a tensor of the shape of `x`."
            return
    for scale in (5.0, 0.5, 1.0):
        x = draw(scale)
        if not torch.allclose(answer(x.clone()), right(x)):
            yield f"without any tape, a tensor whose largest number is {scale} comes out wrong."
    for at_capture, later in ((5.0, 0.5), (0.5, 5.0), (5.0, 2.0)):
        x = draw(at_capture)
        tape = Recorder()
        with tape:
            y = answer(x)
        x.copy_(draw(later))
        expected = right(x.clone())
        tape.replay()
        if not torch.allclose(y, expected):
            looks = any(op._schema.name in LOOKS for op, *_ in tape.calls)
            why = (
                "Somewhere Python still asks for a number (in an `if`, with `float()`, `max()` or `.item()`), and "
                "keeps what it got at capture."
                if looks
                else "Is the answer written where the tape knows of?"
            )
            case = f"captured with a largest number of {at_capture} and replayed with {later}"
            yield f"{case}, it gives a wrong answer. {why}"


LOOKS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero"}


@exercise(3, "The three rules of a graph, in one place: one shape, one memory, and answers that outlive the next call.")
def check_careful(answer: Any, random: random.Random) -> Iterator[str]:
    generator = torch.Generator().manual_seed(random.randrange(1000))
    num_rows, size = random.randint(2, 6), random.randint(3, 9)
    weight = torch.randn(size, 4, generator=generator)
    num_calls = 0

    def function(x: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        return (x @ weight).relu()

    inputs = torch.randn(3, num_rows, size, generator=generator)
    example = inputs[0].clone()
    careful = answer(function, example)
    given = [x.clone() for x in inputs]
    first = attempted(careful(given[0]))
    calls = num_calls
    kept = first.clone()
    for x in (given[1], given[2]):
        got = careful(x)
        if got.shape != (num_rows, 4) or not torch.allclose(got, (x @ weight).relu()):
            yield "the second call answers another input. Are the new numbers copied into the tape's own tensor?"
            return
    if num_calls > calls:
        yield f"each call runs the function again ({num_calls} times in all). Record it once, then only replay."
    if not torch.equal(first, kept):
        yield "a later call changes an earlier one's answer. Return a copy: the tape uses its memory again."
    if not all(torch.equal(x, saved) for x, saved in zip(given, inputs)):
        yield "a call changes the tensor that it was given. Keep a buffer of your own."
    wrong = {f"{num_rows + 1} rows": (num_rows + 1, size), "one row": (1, size), "another width": (num_rows, 1)}
    for words, shape in wrong.items():
        try:
            careful(torch.zeros(shape))
        except ValueError as error:
            told = str(error)
            if not all(str(n) in told for n in (*shape, num_rows, size)):
                yield f"the message for {words} is {told!r}. Name both shapes: what came, and the tape's own."
        except RuntimeError as error:
            yield f"{words} gives PyTorch's own error ({str(error)[:60]} …). Refuse it yourself, before you copy."
        else:
            yield f"a tensor of {words} is accepted. (`copy_` spreads one row over many, without a word.)"


@exercise(4, "Few graphs can be nearly as good as many, if they stand where the steps are.")
def check_choose_buckets(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    cases = [([1] * 50 + [7] * 40 + [8] * 10, 2), ([3, 3, 3, 10, 20], 1), ([5, 9], 4)]
    for _ in range(8):
        common = random.sample(range(1, 40), 6)
        cases.append((random.choices(common, [random.randint(1, 30) for _ in common], k=60), random.randint(1, 4)))
    for sizes, num_graphs in cases:
        got = attempted(answer(list(sizes), num_graphs))
        case = f"for {counts(sizes)} and at most {num_graphs} graph{'s' * (num_graphs > 1)}"
        if not isinstance(got, (list, tuple, set)) or not got:
            yield f"{case} you return {got!r}. Return a list of buckets."
            return
        chosen = sorted(got)
        if len(chosen) > num_graphs:
            yield f"{case} you return {len(chosen)} buckets, {chosen}."
        elif chosen[-1] < max(sizes):
            yield f"{case} the largest of your buckets is {chosen[-1]}: a step of {max(sizes)} has none."
        else:
            best = best_buckets(sizes, num_graphs)
            if padding_of(sizes, chosen) > padding_of(sizes, best):
                yield (
                    f"{case} your buckets {chosen} pad {padding_of(sizes, chosen)} rows. There are some that pad "
                    f"{padding_of(sizes, best)}."
                )


def counts(sizes: Collection[int]) -> str:
    """Step sizes in words."""
    listed = sorted(sizes)
    return ", ".join(f"{listed.count(n)} × {n}" for n in dict.fromkeys(listed)) + " tokens"


def padding_of(sizes: Collection[int], buckets: Sequence[int]) -> int:
    """Rows of padding if each step takes the smallest bucket that holds it."""
    return sum(min(bucket for bucket in buckets if bucket >= n) - n for n in sizes)


def best_buckets(sizes: Collection[int], num_graphs: int) -> list[int]:
    """All choices tried: a bucket between two sizes that occur is never better than the smaller of them."""
    *others, largest = sorted(set(sizes))
    choices = [[*few, largest] for k in range(min(num_graphs, len(others) + 1)) for few in combinations(others, k)]
    return min(choices, key=lambda buckets: padding_of(sizes, buckets))
