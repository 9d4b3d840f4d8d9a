"""What the chapters share: the running example, source(), show(), saving, the generated cells, the guard."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from nanovllm import LLM
from nanovllm.engine.scheduler import Scheduler
from nanovllm.lessons import OPENING, PROMPTS, guard, series, show, source
from nanovllm.lessons.__main__ import execute, normalise
from nanovllm.lessons.checks import NotAttempted, attempted, exercise
from nanovllm.lessons.pictures import ARROWS, PARTS
from nanovllm.lessons.saving import WIDGET, drop_live_entries
from nanovllm.lessons.series import CHAPTERS, navigation, series_table
from nanovllm.utils.checkpoint import load_tokenizer
from nanovllm.utils.hub import resolve_model

ROOT = Path(__file__).parent.parent


def test_running_example_has_the_lengths_that_the_chapters_count_on():
    tokenizer = load_tokenizer(resolve_model(None))
    assert {name: len(tokenizer.encode(prompt)) for name, prompt in PROMPTS.items()} == {
        "A": 27,
        "B": 27,
        "C": 40,
        "D": 5,
    }
    a, b = tokenizer.encode(PROMPTS["A"]), tokenizer.encode(PROMPTS["B"])
    assert a[:22] == b[:22] and a[22] != b[22]
    assert tokenizer.decode(a[:17]) == OPENING


def test_size_of_the_default_model_in_the_text():
    from safetensors import safe_open

    with safe_open(resolve_model(None) / "model.safetensors", "np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    sizes = [shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes]
    assert sum(sizes) == 134_515_008


# -- Display -----------------------------------------------------------------------------------------------------------


def test_source_shows_code_and_the_same_text():
    shown = source(Scheduler.schedule)
    assert shown._repr_markdown_() == repr(shown)
    lines = repr(shown).splitlines()
    assert lines[0] == "`nanovllm/engine/scheduler.py: Scheduler.schedule`"
    assert lines[2] == "```python" and lines[-1] == "```"
    assert lines[3] == "def schedule(self) -> Batch:"
    assert str(ROOT) not in repr(shown)


def test_show_gives_a_picture_with_alt_text_and_a_caption(monkeypatch):
    displayed = []
    monkeypatch.setattr("nanovllm.lessons.display.display", lambda data, **kwargs: displayed.append((data, kwargs)))
    show(Figure(), "the gap.", alt="Two bars, 3 and 4.")
    (picture, about), (caption, _) = displayed
    assert picture.keys() == {"image/png", "text/plain"} and picture["text/plain"] == "Two bars, 3 and 4."
    assert about["metadata"]["image/png"]["alt"] == "Two bars, 3 and 4."
    assert caption["text/markdown"] == "*Look for the gap.*"


# -- Exercises ---------------------------------------------------------------------------------------------------------


def test_checks_give_the_first_complaint():
    @exercise(7, "Well done.")
    def check(answer, random):
        for case in (1, 2, 3):
            if attempted(answer(case)) != case:
                yield f"wrong for {case}."

    assert repr(check(lambda x: x)) == "Exercise 7: right. Well done."
    assert repr(check(lambda x: x % 2)) == "Exercise 7: not yet. Wrong for 2."
    assert repr(check(lambda x: None)) == "Exercise 7: not attempted yet."
    assert repr(check(lambda x: 1 / 0)) == "Exercise 7: not yet. Your code raised ZeroDivisionError: division by zero"


def test_attempted():
    assert attempted(0) == 0
    for stub in (None, ...):
        with pytest.raises(NotAttempted):
            attempted(stub)


# -- Saving ------------------------------------------------------------------------------------------------------------


def notebook_with(*outputs):
    cell = new_code_cell("1", execution_count=1, outputs=list(outputs), id="one")
    return new_notebook(cells=[cell], metadata={"widgets": {"state": {}}})


def test_live_entries_are_dropped_where_something_remains():
    both = new_output("display_data", {WIDGET: {"model_id": "x"}, "image/png": "p", "text/plain": "t"})
    alone = new_output("display_data", {WIDGET: {"model_id": "x"}})
    notebook = notebook_with(both, alone)
    drop_live_entries(model={"type": "notebook", "content": notebook}, path="a.ipynb", contents_manager=None)
    first, second = notebook.cells[0].outputs
    assert first.data.keys() == {"image/png", "text/plain"}
    assert second.data.keys() == {WIDGET}
    assert "widgets" not in notebook.metadata


@pytest.mark.parametrize("model", [{"type": "file", "content": "text"}, {"type": "notebook", "content": None}])
def test_other_files_are_left_alone(model):
    before = dict(model)
    drop_live_entries(model=model, path="a")
    assert model == before


def test_jupyter_calls_the_hook_by_the_name_that_lab_gives_it(tmp_path):
    """The spelling of `nanovllm lab`'s option, on the contents manager that a Jupyter server has."""
    from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
    from traitlets.config import Config

    main = (ROOT / "nanovllm" / "__main__.py").read_text()
    option = "--ContentsManager.pre_save_hook=nanovllm.lessons.saving.drop_live_entries"
    assert option in main
    config = Config({"ContentsManager": {"pre_save_hook": option.split("=")[1]}})
    manager = AsyncLargeFileManager(root_dir=str(tmp_path), config=config)
    model = {"type": "notebook", "content": notebook_with()}
    manager.run_pre_save_hooks(model=model, path="a.ipynb")
    assert "widgets" not in model["content"]["metadata"]


def test_execute_saves_a_picture_without_its_live_widget(tmp_path):
    code = """
import os
import ipywidgets
class Picture:
    def _repr_mimebundle_(self, **kwargs):
        return ipywidgets.Label("live")._repr_mimebundle_() | {"text/plain": "a picture"}
print(os.path.basename(os.getcwd()))
Picture()"""
    cells = [new_code_cell(code, id="picture"), new_markdown_cell("by hand", id="navigation")]
    path = tmp_path / "00_quickstart.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    execute(path)
    notebook = nbformat.read(path, as_version=4)
    stream, picture = notebook.cells[0].outputs
    assert stream.text == tmp_path.name + "\n"  # a chapter runs in its own folder
    assert picture.data == {"text/plain": "a picture"}
    assert [cell.id for cell in notebook.cells] == ["picture", "navigation"]
    assert notebook.cells[1].source == navigation("00_quickstart")
    assert notebook.metadata["nanovllm"] == {
        "smallest_margin": None,
        "greedy_choices": 0,
        "code": guard.digest(notebook),
    }


def test_the_model_is_there_before_a_chapter_runs(tmp_path, monkeypatch):
    """Else the bar of its download would be saved with the first chapter that is run on a machine."""
    monkeypatch.setattr("nanovllm.utils.hub.resolve_model", lambda name: (tmp_path / "model").touch())
    path = tmp_path / "00_quickstart.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("import os\nprint(os.path.exists('model'))", id="look")]), path)
    execute(path)
    assert nbformat.read(path, as_version=4).cells[0].outputs[0].text == "True\n"


def test_normalise_keeps_tags_alone():
    notebook = notebook_with()
    notebook.metadata["language_info"] = {"version": "3.99"}
    notebook.cells[0].metadata.update({"tags": ["nbval-skip"], "execution": {"iopub": 1}})
    normalise(notebook)
    assert notebook.cells[0].metadata == {"tags": ["nbval-skip"]}
    assert "version" not in notebook.metadata.language_info and notebook.metadata.kernelspec.name == "python3"


# -- The series --------------------------------------------------------------------------------------------------------


def test_only_existing_chapters_are_linked(tmp_path, monkeypatch):
    monkeypatch.setattr(series, "NOTEBOOKS", tmp_path)
    assert "](" not in series_table() + navigation("01_kv_cache")
    (tmp_path / "00_quickstart.ipynb").touch()
    (tmp_path / "02_paged_attention.ipynb").touch()
    assert navigation("01_kv_cache").startswith("Before: [00_quickstart](00_quickstart.ipynb) ·\nNext: [02_paged")
    assert "Before" not in navigation("00_quickstart") and "Next" not in navigation(CHAPTERS[-1].name)


def test_the_map_names_what_exists():
    assert all((ROOT / file).is_file() for *_, file, _, _ in PARTS.values())
    assert {name for start, end, _ in ARROWS for name in (start, end)} == PARTS.keys()
    numbers = {chapter.name[:2] for chapter in CHAPTERS}
    assert all(set(chapters.split()) <= numbers for *_, chapters in PARTS.values())


# -- The guard: each fault is found ------------------------------------------------------------------------------------


def faulty(tmp_path, change) -> list[str]:
    """What the guard says of a good notebook after `change`."""
    picture = new_output("display_data", {"image/png": "p", "text/plain": "t"}, metadata={"image/png": {"alt": "a"}})
    caption = new_output("display_data", {"text/markdown": "*Look for it.*", "text/plain": "*Look for it.*"})
    cells = [new_markdown_cell("# Why?\n![a picture](a.png)", id="title")]
    for i in range(1, 20):
        cells += [new_markdown_cell("text", id=f"text-{i}")]
        cells += [new_code_cell(f"{i}", execution_count=i, outputs=[picture.copy(), caption], id=f"code-{i}")]
    notebook = nbformat.from_dict(new_notebook(cells=cells))
    (tmp_path / "a.png").touch()
    change(notebook)
    notebook.metadata.setdefault(
        "nanovllm", {"code": guard.digest(notebook), "greedy_choices": 9, "smallest_margin": 0.02}
    )
    path = tmp_path / "00_test.ipynb"
    nbformat.write(notebook, path)
    return guard.problems(path)


def test_guard_accepts_a_good_notebook(tmp_path):
    assert faulty(tmp_path, lambda notebook: None) == []


def test_cells_that_go_deeper_are_not_counted(tmp_path):
    def go_deeper(notebook):
        deeper = [new_markdown_cell("text", id=f"deeper-text-{i}") for i in range(20)]
        notebook.cells += [*deeper, new_code_cell("1\n" * 40, execution_count=20, id="deeper-long")]

    assert faulty(tmp_path, go_deeper) == []


def test_one_long_cell_a_chapter_however_deep(tmp_path):
    def lengthen(notebook):
        notebook.cells += [new_code_cell("1\n" * 30, execution_count=20, id="deeper-long")]
        notebook.cells[2].update(source="1\n" * 30)

    words = "cells ['code-1', 'deeper-long'] are longer than 20 lines; one a chapter may have 40"
    assert faulty(tmp_path, lengthen) == [words]


def set_output(**fields):
    def change(notebook):
        notebook.cells[2].outputs[0].update(fields)

    return change


def skip_three(notebook):
    for cell in notebook.cells[2:8:2]:
        cell.metadata["tags"] = ["nbval-skip"]


FAULTS = {
    "not executed in order": lambda nb: nb.cells[2].update(execution_count=7),
    "skips more than two": skip_three,
    "state of widgets": lambda nb: nb.metadata.update(widgets={}),
    "a live widget": set_output(data={WIDGET: {}, "text/plain": "t"}),
    "memory address": set_output(data={"text/plain": "<A object at 0x7f00aa>"}),
    "HTML or SVG": set_output(data={"text/html": "t"}),
    "no alt text": set_output(metadata={}),
    "what to look for": lambda nb: nb.cells[2].outputs.pop(),
    "failed with E": lambda nb: nb.cells[2].outputs.append(new_output("error", ename="E", evalue="", traceback=[])),
    "writes to stderr": lambda nb: nb.cells[2].outputs.append(new_output("stream", name="stderr", text="warning")),
    "absolute path": lambda nb: nb.cells[2].update(source="open('/home/me/x')"),
    "links to 09.ipynb": lambda nb: nb.cells[1].update(source="[next](09.ipynb)"),
    "image b.png has no alt text": lambda nb: nb.cells[1].update(source="![](b.png)"),
    "nanovllm.LLLM": lambda nb: nb.cells[1].update(source="`nanovllm.LLLM`"),
    "nanovllm/engine/nothing.py": lambda nb: nb.cells[1].update(source="`nanovllm/engine/nothing.py`"),
    "longer than 20 lines": lambda nb: [nb.cells[i].update(source="1\n" * 21 + "1") for i in (2, 4)],
    "has 5 cells": lambda nb: nb.update(cells=nb.cells[:5]),
    "open with a question": lambda nb: nb.cells[0].update(source="import torch"),
    "code is not what was run": lambda nb: nb.metadata.update(nanovllm={"code": "another"}),
    "a margin of 0.009": lambda nb: nb.metadata.update(
        nanovllm={"code": guard.digest(nb), "greedy_choices": 9, "smallest_margin": 0.009}
    ),
    "bytes; 1,500,000": set_output(data={"image/png": "p" * 1_600_000, "text/plain": "t"}),
}


@pytest.mark.parametrize("words", FAULTS)
def test_guard_finds(tmp_path, words):
    assert any(words in problem for problem in faulty(tmp_path, FAULTS[words]))


def test_guard_finds_the_name_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "mymachine")
    found = faulty(tmp_path, lambda nb: nb.cells[1].update(source="on mymachine"))
    assert found == ["it holds the name of this machine, mymachine"]


def test_resolves():
    assert guard.resolves("nanovllm.engine.scheduler.Scheduler.schedule")
    assert not guard.resolves("nanovllm.engine.scheduler.Scheduler.plan")
    assert not guard.resolves("nanovllm.nothing")


def test_check_command():
    run = subprocess.run([sys.executable, "-m", "nanovllm.lessons", "check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "as they should be" in run.stdout


def test_notebooks_are_plain_json():
    for path in series.NOTEBOOKS.glob("*.ipynb"):
        assert json.loads(path.read_text())["nbformat_minor"] == 5


def test_llm_is_what_the_chapters_import():
    assert LLM.__module__ == "nanovllm.llm"
