"""The maintenance command: the only thing that writes the notebooks' outputs.

python -m nanovllm.lessons run [00 …]   execute the chapters and save them
python -m nanovllm.lessons draw         draw the pictures that stand in their texts
python -m nanovllm.lessons check        say what is wrong with what is saved
python -m nanovllm.lessons record NN    on a GPU: make the recordings that a chapter shows to those without one
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from nanovllm.lessons.guard import problems
from nanovllm.lessons.saving import drop_from
from nanovllm.lessons.series import GENERATED, NOTEBOOKS

METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
    },
}


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m nanovllm.lessons", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute and save")
    run.add_argument("numbers", nargs="*", metavar="NN", help="chapters, such as 00 (default: all)")
    commands.add_parser("draw", help="draw the pictures of the texts")
    commands.add_parser("check", help="verify what is saved")
    record = commands.add_parser("record", help="on a GPU: make the recordings of a chapter")
    record.add_argument("chapter", metavar="NN", help="its number, such as 05")
    args = parser.parse_args()

    paths = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if args.command == "draw":
        from nanovllm.lessons.pictures import draw_all  # this loads torch and runs the model

        draw_all(NOTEBOOKS / "images")
    if args.command == "record":
        from nanovllm.lessons.record import record as make_recordings  # this loads torch

        try:
            for path in make_recordings(args.chapter):
                print(f"{path.relative_to(NOTEBOOKS.parent)}: {path.stat().st_size:,} bytes")
        except (RuntimeError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
    if args.command == "run":
        for path in paths:
            if not args.numbers or path.name[:2] in args.numbers:
                start = time.perf_counter()
                execute(path)
                print(f"{path.name}: executed in {time.perf_counter() - start:.0f} s")
    found = [f"{path.name}: {problem}" for path in paths for problem in problems(path)]
    print("\n".join(found) or f"{len(paths)} notebooks are as they should be")
    return 1 if found else 0


def execute(path: Path) -> None:
    """Execute a notebook in a fresh kernel and save it, in a form that depends on its content alone."""
    from nanovllm.lessons.margins import margins_of  # this loads torch
    from nanovllm.utils.hub import resolve_model

    resolve_model(None)  # now, or the bar of its download would be saved
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.id in GENERATED:
            cell.source = GENERATED[cell.id](path.stem)
    options: dict[str, Any] = dict(timeout=300, kernel_name="python3", store_widget_state=False, record_timing=False)
    NotebookClient(
        notebook, coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}, **options
    ).execute()
    normalise(notebook)
    notebook.metadata["nanovllm"] = margins_of(notebook)
    nbformat.write(notebook, path)


def normalise(notebook: Any) -> None:
    """Leave out what differs from machine to machine, and what needs a kernel to be seen."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    drop_from(notebook)


if __name__ == "__main__":
    sys.exit(main())
