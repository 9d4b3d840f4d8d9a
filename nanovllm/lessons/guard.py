"""The guard: what must hold of every saved notebook. It reads the file and runs nothing."""

import hashlib
import importlib
import re
import socket
from pathlib import Path
from typing import Any

import nbformat

from nanovllm.lessons.saving import WIDGET

MAX_BYTES = 1_500_000
MAX_LINES = 20
MIN_MARGIN = 0.01  # by which the best logit leads the second best where a chapter decodes greedily
DEEPER = "deeper-"  # what the id of a cell that may be skipped begins with: not one of the 35 to 55
SKIP = {"nbval-skip", "nbval-ignore-output"}  # not run at all; run, and not compared
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|usr|opt|mnt|var)/|\b[A-Z]:\\\\|file://")


def problems(path: Path) -> list[str]:
    """What is wrong with the notebook at `path`, as sentences."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    num_cells = sum(not cell.id.startswith(DEEPER) for cell in notebook.cells)
    if not 35 <= num_cells <= 55:
        found.append(f"it has {num_cells} cells; a chapter has 35 to 55")
    if notebook.cells[0].cell_type != "markdown" or "![" not in notebook.cells[0].source:
        found.append("it does not open with a question and a picture")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells were not executed in order, once each")
    if sum(bool(SKIP & set(cell.metadata.get("tags", []))) for cell in code) > 2:
        found.append("it skips more than two cells")
    when_run = notebook.metadata.get("nanovllm", {})
    if when_run.get("code") != digest(notebook):
        found.append("its code is not what was run when it was saved")
    elif when_run["greedy_choices"] and when_run["smallest_margin"] < MIN_MARGIN:
        found.append(f"a greedy choice has a margin of {when_run['smallest_margin']}; {MIN_MARGIN} are needed")
    long = [cell.id for cell in code if len(cell.source.splitlines()) > MAX_LINES]
    if len(long) > 1 or any(len(cell.source.splitlines()) > 40 for cell in code):
        found.append(f"cells {long} are longer than {MAX_LINES} lines; one a chapter may have 40")
    if "widgets" in notebook.metadata:
        found.append("it holds the state of widgets")
    if path.stat().st_size > MAX_BYTES:
        found.append(f"it has {path.stat().st_size:,} bytes; {MAX_BYTES:,} are allowed")
    found += local_names(path.read_text())
    for cell in notebook.cells:
        complaints = [*links(cell.source, path.parent), *symbols(cell.source)]
        if cell.cell_type == "code":
            complaints += outputs(cell.outputs)
        found += [f"cell {cell.id}: {complaint}" for complaint in complaints]
    return found


def digest(notebook: Any) -> str:
    """What stands for the code of a notebook."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()[:16]


def outputs(cell_outputs: list[Any]) -> list[str]:
    """Errors, noise, live widgets, and pictures without alt text or caption."""
    found = []
    for i, output in enumerate(cell_outputs):
        if output.output_type == "error":
            found.append(f"it failed with {output.ename}: {output.evalue}")
        if output.output_type == "stream" and output.name == "stderr":
            found.append(f"it writes to stderr: {output.text[:80]!r}")
        data = output.get("data", {})
        if WIDGET in data:
            found.append("it holds a live widget")
        if re.search(r"<.* at 0x[0-9a-f]+>", str(data.get("text/plain", ""))):
            found.append("its text holds a memory address")
        if any(kind in data for kind in ("text/html", "image/svg+xml")):
            found.append("it shows HTML or SVG")
        if "image/png" in data:
            about = output.metadata.get("image/png", {})
            if not about.get("alt"):
                found.append("its picture has no alt text")
            following = cell_outputs[i + 1].get("data", {}) if i + 1 < len(cell_outputs) else {}
            if "widget" not in about and "Look for" not in str(following.get("text/markdown", "")):
                found.append("its picture has no caption that says what to look for")
    return found


def local_names(text: str) -> list[str]:
    """Absolute paths, and the name of the machine that it was run on."""
    found = [
        f"it holds an absolute path: {text[max(0, m.start() - 20):m.end() + 30]!r}" for m in ABSOLUTE.finditer(text)
    ]
    host = socket.gethostname()
    if len(host) > 3 and re.search(rf"\b{re.escape(host)}\b", text):
        found.append(f"it holds the name of this machine, {host}")
    return found


def links(source: str, folder: Path) -> list[str]:
    """Markdown links and images to files that are not there, and images without alt text."""
    found = []
    for mark, label, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", source):
        if not re.match(r"https?:|#|attachment:", target) and not (folder / target.split("#")[0]).exists():
            found.append(f"it links to {target}, which does not exist")
        if mark and not label:
            found.append(f"its image {target} has no alt text")
    return found


def symbols(source: str) -> list[str]:
    """Names of the package, in backticks, that do not exist: modules, files and what they hold."""
    root = Path(__file__).resolve().parent.parent.parent
    found = []
    for name in re.findall(r"`(nanovllm/[\w/.]+)`", source):
        if not (root / name).exists():
            found.append(f"it names the file {name}, which does not exist")
    for name in re.findall(r"`(nanovllm(?:\.\w+)+)`", source):
        if not resolves(name):
            found.append(f"it names {name}, which does not exist")
    return found


def resolves(name: str) -> bool:
    """Whether a dotted name can be imported, or reached by attributes from a module that can."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False
