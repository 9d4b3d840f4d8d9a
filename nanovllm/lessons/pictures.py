"""The pictures that stand in a chapter's text: drawn from a run of the engine, or maps of what there is."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from nanovllm import LLM, SamplingParams
from nanovllm.lessons.chapter_01 import draw_heads, draw_work
from nanovllm.lessons.chapter_02 import draw_memory
from nanovllm.lessons.chapter_03 import draw_shared
from nanovllm.lessons.chapter_04 import draw_batching
from nanovllm.lessons.chapter_05 import draw_queue
from nanovllm.lessons.chapter_06 import draw_layer
from nanovllm.lessons.example import PROMPTS
from nanovllm.viz.theme import EMPTY, INK, QUIET, colour, hatch, ink_on, new_figure, png, styled

Timeline = list[dict[str, int]]  # for each step: request -> tokens computed in it


def draw_all(folder: Path) -> None:
    """Draw them all into `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "00_together.png").write_bytes(png(draw_timelines(*record_timelines())))
    (folder / "00_map.png").write_bytes(png(draw_map()))
    (folder / "01_work.png").write_bytes(png(draw_work()))
    (folder / "01_heads.png").write_bytes(png(draw_heads()))
    (folder / "02_memory.png").write_bytes(png(draw_memory()))
    (folder / "03_shared.png").write_bytes(png(draw_shared()))
    (folder / "04_slots.png").write_bytes(png(draw_batching()))
    (folder / "05_queue.png").write_bytes(png(draw_queue()))
    (folder / "06_layer.png").write_bytes(png(draw_layer()))


# -- Four requests, one at a time and together -------------------------------------------------------------------------


def record_timelines() -> tuple[Timeline, Timeline]:
    """Run the four prompts one at a time, then together."""
    llm = LLM(dtype="float32", enable_prefix_caching=False)
    one_at_a_time = [step for name in PROMPTS for step in record(llm, [name])]
    return one_at_a_time, record(llm, list(PROMPTS))


def record(llm: LLM, names: list[str]) -> Timeline:
    params = SamplingParams(temperature=0, max_tokens=16, stop="\n")
    ids = {llm.add_request(PROMPTS[name], params): name for name in names}
    timeline = []
    while llm.has_unfinished_requests():
        batch, _ = llm.engine.step()
        timeline.append({ids[s.seq.id]: s.num_new_tokens for s in batch.scheduled})
    return timeline


def draw_timelines(one_at_a_time: Timeline, together: Timeline) -> Figure:
    """A row for each request, a column for each step."""
    figure = new_figure(9, 3.7)
    with styled():
        axes = figure.subplots(2, 1, sharex=True)
        for ax, title, timeline in zip(axes, ("One at a time", "Together"), (one_at_a_time, together)):
            for row, name in enumerate(PROMPTS):
                ax.add_patch(Rectangle((0, row - 0.42), len(timeline), 0.84, facecolor=EMPTY, edgecolor="none"))
                for step, tokens in enumerate(timeline):
                    if name in tokens:
                        draw_share(ax, step, row, name, tokens[name])
            ax.set_xlim(0, len(one_at_a_time))
            ax.set_ylim(len(PROMPTS) - 0.5, -0.5)
            ax.set_yticks(range(len(PROMPTS)), list(PROMPTS), fontweight="bold")
            ax.tick_params(length=0)
            ax.set_title(f"{title}: {len(timeline)} steps")
        axes[1].set_xlabel("step of the engine")
    return figure


def draw_share(ax: Axes, step: int, row: int, name: str, num_tokens: int) -> None:
    """What one request gets from one step: a prompt is marked with its number of tokens."""
    texture = dict(facecolor=colour(name), hatch=hatch(name), edgecolor="white", linewidth=0.8)
    ax.add_patch(Rectangle((step, row - 0.42), 1, 0.84, **texture))  # type: ignore[arg-type]
    if num_tokens > 1:
        box = dict(boxstyle="round,pad=0.1", facecolor=colour(name), edgecolor="none")
        ink = ink_on(colour(name))
        ax.text(step + 0.5, row, str(num_tokens), ha="center", va="center", fontsize=7, color=ink, bbox=box)


# -- The map of the package --------------------------------------------------------------------------------------------

PARTS = {  # part: (left, bottom, width, file, what it does, chapters)
    "LLM": (0.0, 4.2, 3.0, "nanovllm/llm.py", "generate, chat, stream", "00"),
    "LLMEngine": (3.6, 4.2, 3.0, "nanovllm/engine/llm_engine.py", "add_request, step, abort", "00"),
    "Scheduler": (0.0, 2.4, 3.0, "nanovllm/engine/scheduler.py", "who runs, how many tokens", "04"),
    "ModelRunner": (3.6, 2.4, 3.0, "nanovllm/engine/model_runner.py", "a batch becomes tensors", "05 06"),
    "Detokenizer": (7.2, 2.4, 3.0, "nanovllm/engine/detokenizer.py", "tokens become text", "00"),
    "BlockManager": (0.0, 0.6, 3.0, "nanovllm/engine/block_manager.py", "who owns which block", "02 03"),
    "Model": (3.6, 0.6, 3.0, "nanovllm/models/llama.py", "layers, KV cache, attention", "01 02"),
    "Sampler": (7.2, 0.6, 3.0, "nanovllm/layers/sampler.py", "logits become tokens", "00"),
}
ARROWS = [  # from, to, label
    ("LLM", "LLMEngine", ""),
    ("LLMEngine", "Scheduler", "1 schedule"),
    ("LLMEngine", "ModelRunner", "2 launch"),
    ("LLMEngine", "Detokenizer", "3 text"),
    ("Scheduler", "BlockManager", ""),
    ("ModelRunner", "Model", ""),
    ("ModelRunner", "Sampler", ""),
]


def draw_map() -> Figure:
    """The parts of the engine, who calls whom, and which chapter takes each apart."""
    figure = new_figure(9, 4.6)
    with styled():
        ax = figure.subplots()
        for start, end, label in ARROWS:
            draw_arrow(ax, start, end, label)
        for name, (left, bottom, width, file, duty, chapters) in PARTS.items():
            box = FancyBboxPatch((left, bottom), width, 1.1, boxstyle="round,pad=0,rounding_size=0.08")
            box.set(facecolor="white", edgecolor=INK, linewidth=1.1)
            ax.add_patch(box)
            ax.text(left + 0.12, bottom + 0.82, name, fontweight="bold", fontsize=11, va="center")
            ax.text(left + 0.12, bottom + 0.5, duty, fontsize=9, va="center")
            ax.text(left + 0.12, bottom + 0.2, file.removeprefix("nanovllm/"), fontsize=7.5, va="center", color=QUIET)
            for i, chapter in enumerate(reversed(chapters.split())):
                badge = dict(boxstyle="round,pad=0.25", facecolor="#0072B2", edgecolor="none")
                x = left + width - 0.25 - 0.42 * i
                ax.text(x, bottom + 0.84, chapter, ha="center", va="center", fontsize=8, color="white", bbox=badge)
        ax.set_xlim(-0.1, 10.3)
        ax.set_ylim(0.45, 5.4)
        ax.axis("off")
    return figure


def draw_arrow(ax: Axes, start: str, end: str, label: str) -> None:
    """An arrow between two boxes: sideways in the same row, else from the lower edge to the upper one."""
    (left, bottom, width, *_), (to_left, to_bottom, to_width, *_) = PARTS[start], PARTS[end]
    if bottom == to_bottom:
        points = (left + width, bottom + 0.55), (to_left, to_bottom + 0.55)
    else:
        lean = 0.9 * ((to_left > left) - (to_left < left))
        points = (left + width / 2 + lean, bottom), (to_left + to_width / 2 - lean, to_bottom + 1.1)
    ax.add_patch(FancyArrowPatch(*points, arrowstyle="-|>", mutation_scale=12, color=QUIET, shrinkA=0, shrinkB=0))
    (x0, y0), (x1, y1) = points
    white = dict(boxstyle="round,pad=0.15", facecolor="white", edgecolor="none")
    if label:
        ax.text((x0 + x1) / 2, (y0 + y1) / 2, label, fontsize=9, ha="center", va="center", color=INK, bbox=white)
