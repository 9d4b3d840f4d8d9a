"""The series: its chapters in order, and the cells that are written from this list, never by hand."""

from dataclasses import dataclass
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parent.parent.parent / "notebooks"


@dataclass(frozen=True, slots=True)
class Chapter:
    """A notebook, existing or planned, and the question that it answers."""

    name: str
    title: str
    question: str
    plays_with: str

    @property
    def path(self) -> Path:
        return NOTEBOOKS / f"{self.name}.ipynb"

    @property
    def link(self) -> str:
        """A link if the chapter exists, else its name."""
        return f"[{self.name}]({self.name}.ipynb)" if self.path.is_file() else self.name


CHAPTERS = [
    Chapter("00_quickstart", "Quickstart", "What does an inference engine do for me?", "a live engine, step by step"),
    Chapter(
        "01_kv_cache", "The KV cache", "Why is generating token 500 not 500 times the work?", "a memory calculator"
    ),
    Chapter(
        "02_paged_attention",
        "Paged attention",
        "Where does the KV cache live when lengths are unknown?",
        "the map of every block, through time",
    ),
    Chapter(
        "03_prefix_caching",
        "Prefix caching",
        "How can two requests share work without knowing of each other?",
        "shared blocks and hit rates",
    ),
    Chapter(
        "04_scheduling",
        "Scheduling",
        "Who runs next, and with how many tokens?",
        "a policy of your own in the real engine",
    ),
    Chapter("05_cuda_graphs", "CUDA graphs", "Why is the GPU idle while Python thinks?", "a timeline of launches"),
    Chapter(
        "06_tensor_parallelism",
        "Tensor parallelism",
        "How does one model run on many devices?",
        "a real run on three processes",
    ),
    Chapter(
        "07_whole_engine",
        "The whole engine",
        "How close is it to what the hardware allows?",
        "a roofline with your own machine on it",
    ),
    Chapter("08_your_turn", "Your turn", "How do I make it mine?", "your own model, layer and optimisation"),
]


def series_table() -> str:
    """The map of the series as a markdown table."""
    rows = [f"| {c.link} | {c.question} | {c.plays_with} |" for c in CHAPTERS]
    return "\n".join(["| chapter | the question | what you play with |", "|---|---|---|", *rows])


def navigation(name: str) -> str:
    """The links at the end of the chapter called `name`. One that does not exist yet is named without a link."""
    index = [c.name for c in CHAPTERS].index(name)
    parts = []
    if index > 0:
        parts.append(f"Before: {CHAPTERS[index - 1].link}")
    if index + 1 < len(CHAPTERS):
        following = CHAPTERS[index + 1]
        parts.append(f"Next: {following.link}: *{following.question}*")
    return " ·\n".join(parts)


def series_cell(name: str) -> str:
    """The map of the series, and where its words are explained."""
    return f"{series_table()}\n\nThe words of all chapters are explained in the [glossary](../docs/glossary.md)."


GENERATED = {"series": series_cell, "navigation": navigation}
"""Ids of the cells that are generated, and how."""
