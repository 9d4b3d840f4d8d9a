"""The saved notebooks: what they promise about themselves, their exercises, and the margins of their greedy choices."""

import ast
import builtins
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import nbformat
import pytest

from nanovllm.lessons.checks import Verdict
from nanovllm.lessons.guard import DEEPER, SKIP, problems
from nanovllm.lessons.margins import margins_of
from nanovllm.lessons.record import stored
from nanovllm.lessons.series import CHAPTERS, GENERATED, NOTEBOOKS
from tests.conftest import pytest_collection_modifyitems

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
SOLUTION = re.compile(r'<details id="solution-(\d+)">.*?```python\n(.*?)```', re.DOTALL)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks():
    assert PATHS and {path.stem for path in PATHS} <= {chapter.name for chapter in CHAPTERS}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_guard(path):
    assert problems(path) == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_generated_cells_are_up_to_date(path):
    generated = {cell.id: cell.source for cell in read(path).cells if cell.id in GENERATED}
    assert generated.keys() >= {"navigation"}
    assert generated == {id: GENERATED[id](path.stem) for id in generated}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_skipped_cell_is_followed_by_one_that_asserts(path):
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    for cell, following in zip(code, code[1:]):
        if SKIP & set(cell.metadata.get("tags", [])):
            assert "assert" in following.source and not SKIP & set(following.metadata.get("tags", []))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_ids_are_names(path):
    """Stable ids keep diffs small, and details are found by them."""
    ids = [cell.id for cell in read(path).cells]
    assert all(re.fullmatch(r"[a-z][a-z0-9-]+", id) for id in ids) and len(set(ids)) == len(ids)


# -- Exercises ---------------------------------------------------------------------------------------------------------


def exercises(path: Path) -> dict[int, tuple[str, str]]:
    """Number -> code of the stub cell, code of the solution."""
    cells = read(path).cells
    solutions = {int(n): code for cell in cells for n, code in SOLUTION.findall(cell.source)}
    stubs = {int(c.id.split("-")[1]): c.source for c in cells if c.cell_type == "code" and c.id.startswith("exercise-")}
    assert stubs.keys() == solutions.keys()
    return {n: (stubs[n], solutions[n]) for n in stubs}


EXERCISES = [(path, n) for path in PATHS for n in exercises(path)]


def verdict(path: Path, number: int, answer: str | None, seed: int = 0) -> Verdict:
    """Run the stub cell, put `answer` in the place of its function if there is one, run the check in its last line."""
    stub, _ = exercises(path)[number]
    tree = ast.parse(stub)
    check = tree.body.pop()
    namespace: dict = {}
    exec(compile(tree, "stub", "exec"), namespace)
    if answer is not None:
        exec(answer, namespace)
    assert isinstance(check, ast.Expr) and isinstance(check.value, ast.Call)
    check.value.keywords.append(ast.keyword("seed", ast.Constant(seed)))
    return eval(compile(ast.fix_missing_locations(ast.Expression(check.value)), "check", "eval"), namespace)


def check_told(path: Path, number: int, answer: str, words: str) -> None:
    """A wrong answer counts as an attempt, is not right, and is told so in these words."""
    result = verdict(path, number, answer)
    assert result.attempted and not result.right
    assert repr(result).startswith(f"Exercise {number}: not yet. ") and words in repr(result)


def recorded_benchmark() -> dict[str, dict]:
    """The records of the benchmark in the repository, by what they measure."""
    return {record["measurement"]: record for record in stored("07_benchmark")["records"]}


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?<!,)")


def numbers(text: str) -> set[str]:
    return {number.replace(",", "") for number in NUMBER.findall(text)}


def check_numbers_are_seen(path: Path, besides: re.Pattern, derived: dict[str, str], measured: str = "") -> None:
    """Each number of the prose stands in an output, in the code that made it, or in `measured`; so prose goes stale
    with a failing test. What matches `besides` is no claim; `derived` are numbers that follow from others, and how."""
    cells = read(path).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    outputs = [output.get("text") or output.data["text/plain"] for cell in code for output in cell.outputs]
    shown = numbers("\n".join([*outputs, *(cell.source for cell in code), measured]))
    prose = {cell.id: besides.sub("", cell.source) for cell in cells if cell.cell_type == "markdown"}
    unseen = {id: numbers(text) - shown - derived.keys() for id, text in prose.items() if id != "navigation"}
    assert not any(unseen.values()), {id: found for id, found in unseen.items() if found}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_three_to_five_exercises(path):
    assert 3 <= len(exercises(path)) <= 5


@pytest.mark.parametrize(("path", "number"), EXERCISES)
def test_a_stub_does_not_pass(path, number):
    result = verdict(path, number, None)
    assert not result.attempted and not result.right
    assert repr(result) == f"Exercise {number}: not attempted yet."


@pytest.mark.parametrize(("path", "number"), EXERCISES)
def test_a_solution_passes_on_random_workloads(path, number):
    _, solution = exercises(path)[number]
    for seed in (1, 2):
        result = verdict(path, number, solution, seed)
        assert result.right, result


WRONG_00 = [
    (1, "def bytes_per_token(num_layers, num_kv_heads, head_dim, bytes_per_number):\n"
        "    return num_layers * num_kv_heads * head_dim * bytes_per_number", "a key *and* a value"),
    (1, "def bytes_per_token(num_layers, num_kv_heads, head_dim, bytes_per_number):\n"
        "    return 2 * num_layers * head_dim * bytes_per_number", "it takes 114,688"),
    (1, "def bytes_per_token(num_layers, num_kv_heads, head_dim, bytes_per_number):\n"
        "    return 46080", "Qwen3-0.6B"),
    (1, "def bytes_per_token(num_layers):\n"
        "    return 1", "Your code raised TypeError"),
    (2, "def blocks_at_the_end(prompt, answer, size):\n"
        "    return -(-(prompt + answer) // size)", "Is the last token ever stored?"),
    (2, "def blocks_at_the_end(prompt, answer, size):\n"
        "    return (prompt + answer - 1) / size", "round up"),
    (2, "def blocks_at_the_end(prompt, answer, size):\n"
        "    return (prompt + answer - 1) // size", "the engine holds 3 blocks"),
    (3, "def steps_to_first_token(prompt, budget, decoding):\n"
        "    return -(-prompt // budget)", "takes one token of the budget"),
    (3, "def steps_to_first_token(prompt, budget, decoding):\n"
        "    return prompt // (budget - decoding) + 1", "fits exactly"),
    (3, "def steps_to_first_token(prompt, budget, decoding):\n"
        "    return 1", "takes 2 steps, and you say 1"),
    (4, "def race(llm, prompts, params):\n"
        "    return llm.generate(prompts, params, use_tqdm=False)[0]", "is the first to finish"),
    (4, "def race(llm, prompts, params):\n"
        "    for prompt, p in zip(prompts, params): llm.add_request(prompt, p)\n"
        "    finished = []\n"
        "    while not finished: finished = llm.step()\n"
        "    return finished[0]", "still run and hold blocks"),
    (4, "def race(llm, prompts, params):\n"
        "    for prompt, p in zip(prompts, params): llm.add_request(prompt, p)\n"
        "    finished = []\n"
        "    while not finished: finished = llm.step()\n"
        "    return finished", "You return a list"),
    (4, "def race(llm, prompts, params):\n"
        "    for prompt, p in zip(prompts, params): llm.add_request(prompt, p)\n"
        "    finished = []\n"
        "    while llm.has_unfinished_requests(): finished += llm.step()\n"
        "    return finished[0]", "stop as soon as a step returns an answer"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "answer", "words"), WRONG_00)
def test_a_wrong_answer_is_told_what_is_wrong(number, answer, words):
    result = verdict(NOTEBOOKS / "00_quickstart.ipynb", number, answer)
    assert result.attempted and not result.right
    assert repr(result).startswith(f"Exercise {number}: not yet. ") and words in repr(result)


@pytest.mark.parametrize("machine, is_skipped", [("x86_64", False), ("arm64", True)])
def test_outputs_are_compared_where_they_were_saved(monkeypatch, machine, is_skipped):
    marks = []
    cell = SimpleNamespace(path=PATHS[0], add_marker=marks.append, get_closest_marker=lambda name: None)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("sys.platform", "linux")
    pytest_collection_modifyitems([cell])
    assert ["saved on Linux x86-64" in mark.kwargs["reason"] for mark in marks] == [True] * is_skipped


# -- Greedy choices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_greedy_choices_were_looked_at(path):
    """`test_guard` judges their margins, which were measured when the chapter was saved."""
    assert read(path).metadata["nanovllm"]["greedy_choices"] > 100


def test_margins(model_path):
    """The smallest lead of a best logit, of what a notebook decodes greedily; not of exercises and what goes deeper."""
    cell = f"""
from nanovllm import LLM, SamplingParams
llm = LLM({str(model_path)!r}, dtype="float32", device="cpu")
params = [SamplingParams(temperature=t, max_tokens=5, ignore_eos=True, logprobs=2) for t in (0, 1)]
answer, other = llm.generate([[1, 2, 3], [7, 8]], params, use_tqdm=False)
steps = [sorted(step.values())[-2:] for step in answer["logprobs"]]
print("not shown")
"""
    again = "llm.generate([[9, 9]], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)"
    cells = [nbformat.v4.new_code_cell(cell, id="run"), nbformat.v4.new_code_cell(again, id="exercise-1")]
    cells += [nbformat.v4.new_code_cell(again, id=f"{DEEPER}more"), nbformat.v4.new_code_cell("KEEP(steps)", id="keep")]
    kept = []
    with patch.object(builtins, "KEEP", kept.extend, create=True):
        found = margins_of(nbformat.v4.new_notebook(cells=cells))
    assert found["greedy_choices"] == 5
    assert found["smallest_margin"] == pytest.approx(min(best - second for second, best in kept), abs=1e-3)
