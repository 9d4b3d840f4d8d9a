"""The glossary: each entry's chapters exist and use the term."""

import re
from pathlib import Path

import pytest

from nanovllm.lessons.series import NOTEBOOKS
from tests.test_notebooks import read

PAGE = Path(__file__).parent.parent / "docs" / "glossary.md"
ENTRIES = re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
TERMS = [term for term, _, _ in ENTRIES]


def prose(path: Path) -> str:
    text = " ".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    return re.sub(r"\s+", " ", text)


def plain(text: str) -> str:
    """Without what may differ between a term and its use: hyphens, capitals, endings."""
    return re.sub(r"\W+", " ", text.replace("_", " ").lower()).strip()


def stem(term: str) -> str:
    return re.sub(r"(ion|e?s|ed)$", "", plain(term))


@pytest.mark.parametrize(("term", "meaning", "chapters"), ENTRIES, ids=TERMS)
def test_an_entry(term, meaning, chapters):
    links = re.findall(r"\[(\d\d)\]\(\.\./notebooks/(\1_\w+\.ipynb)\)", chapters)
    assert links == sorted(links) and chapters.count("[") == len(links) > 0
    for _, name in links:
        assert stem(term) in plain(prose(NOTEBOOKS / name)), f"{name} does not say {term}"
    assert meaning[0].isupper() and meaning.endswith(".")


def test_entries_are_in_alphabetical_order():
    assert len(TERMS) > 50 and PAGE.read_text().count("\n|") == len(ENTRIES) + 2
    assert [plain(term) for term in TERMS] == sorted(plain(term) for term in TERMS)
