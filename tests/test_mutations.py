"""The mutation check itself: its faults still fit the package, and it tells one kind of failure from another.

The check runs by hand: `python -m tests.mutations`.
"""

import ast

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tests.mutations import FAULTS, ROOT, Finding, prepare, run


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_its_file(fault, tmp_path):
    (tmp_path / fault.file).parent.mkdir(parents=True)
    source = (ROOT / "nanovllm" / fault.file).read_text()
    (tmp_path / fault.file).write_text(source)
    fault.put_into(tmp_path)
    assert ast.dump(ast.parse((tmp_path / fault.file).read_text())) != ast.dump(ast.parse(source))


def test_names_are_unique():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_a_changed_text_is_noticed(tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / FAULTS[0].file).write_text(2 * f"x = {FAULTS[0].text}\n")
    with pytest.raises(AssertionError, match=FAULTS[0].name):
        FAULTS[0].put_into(tmp_path)


CELLS = {
    "same": "1 + 1",
    "output": "1 + 2",
    "assertion": "assert 1 + 1 == 3",
    "error": "[][0]",
    "crash": "from nanovllm.engine import broken",
}


@pytest.mark.parametrize("kind", CELLS)
def test_kinds_of_findings(kind, tmp_path):
    """On a package of one broken module, the real nbval in a real kernel."""
    (tmp_path / "nanovllm" / "engine").mkdir(parents=True)
    (tmp_path / "nanovllm" / "__init__.py").touch()
    (tmp_path / "nanovllm" / "engine" / "broken.py").write_text("assert False")
    two = new_output("execute_result", {"text/plain": "2"}, execution_count=2)
    shown = new_output("execute_result", {"text/plain": "`nanovllm/a.py: f`"}, execution_count=1)
    cells = [
        new_code_cell("'another source'", id="source", execution_count=1, outputs=[shown]),
        new_code_cell(CELLS[kind], id="the-cell", execution_count=2, outputs=[two]),
    ]
    path = tmp_path / "00_test.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    prepare(path, str(tmp_path / "nanovllm" / "__init__.py"))
    assert run(tmp_path, path) == (Finding("same") if kind == "same" else Finding(kind, "the-cell"))
