"""The project's own files: what they promise each other."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml

from nanovllm import LLM, __main__
from nanovllm.lessons.series import CHAPTERS

ROOT = Path(__file__).parent.parent


def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_environment_yml_agrees_with_pyproject():
    project = pyproject()["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda, (pip,) = environment["dependencies"][:-1], environment["dependencies"][-1].values()

    assert pip[-1] == "-e ."
    assert sorted(pip[:-1]) == sorted(project["dependencies"] + project["optional-dependencies"]["dev"])
    assert [name for name in conda if name.startswith("python")][0].startswith("python" + project["requires-python"])


def test_every_import_of_the_package_is_declared():
    """Nothing that merely happens to be installed is used."""
    modules = {"huggingface_hub": "huggingface-hub", "yaml": "pyyaml"}
    project = pyproject()["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["flash"]
    declared = {re.split(r"[^\w-]", d)[0].replace("_", "-") for d in declared}
    local = {"nanovllm"}
    used = set()
    for path in (ROOT / "nanovllm").rglob("*.py"):
        used |= set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
    third_party = used - set(sys.stdlib_module_names) - local
    # these come with jupyterlab and ipywidgets, and are their public interface
    third_party -= {"IPython", "nbclient", "nbformat", "jupyter_server", "traitlets"}
    missing = {name for name in third_party if modules.get(name, name).replace("_", "-") not in declared}
    assert not missing


def test_one_file_alone_imports_flash_attention():
    """The package is an extra, and hard to install: nothing else may come to need it."""
    files = [
        path
        for path in (ROOT / "nanovllm").rglob("*.py")
        if re.search(r"import flash_attn|flash_attn import", path.read_text())
    ]
    assert [path.name for path in files] == ["flash_attention.py"]
    assert not [d for d in pyproject()["project"]["optional-dependencies"]["dev"] if "flash" in d]


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_and_images_of_a_page_exist(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text())
    missing = [link for link in links if "://" not in link and not ((ROOT / page).parent / link).exists()]
    assert not missing


WRITTEN = [
    path
    for kind in ("*.md", "docs/*.md", "nanovllm/**/*.py", "tests/**/*.py", "notebooks/0*.ipynb")
    for path in sorted(ROOT.glob(kind))
]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_of_code_and_prose_have_120_characters_at_most(path):
    """Tables and pictures have to stand on one line, and so does what a document quotes."""
    text = path.read_text()
    if path.suffix == ".md":
        text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    if path.suffix == ".ipynb":
        text = "\n".join(cell.source for cell in nbformat.reads(text, 4).cells)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "!["))]
    assert max(map(len, lines), default=0) <= 120


def test_pre_commit_hooks_run_the_installed_tools():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    assert set(hooks) == {"black", "isort", "mypy"}
    assert all(hook["language"] == "system" for hook in hooks.values())


def test_importing_nanovllm_is_light():
    """The public names load torch and transformers only when they are used."""
    code = "import sys, nanovllm; assert 'torch' not in sys.modules; "
    code += "assert sorted(nanovllm.__all__) == ['LLM', 'SamplingParams']"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["nanovllm", "nanovllm.engine", "nanovllm.layers", "nanovllm.utils"])
def test_every_package_folder_says_what_it_is(module):
    assert (__import__(module, fromlist=["_"]).__doc__ or "").strip()


def test_unknown_public_name():
    import nanovllm

    with pytest.raises(AttributeError, match="LLLM"):
        nanovllm.LLLM


def nanovllm_command(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "nanovllm", *args],
        capture_output=True,
        text=True,
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
    )


def test_command_env():
    out = nanovllm_command("env").stdout
    assert re.search(r"^torch \d", out, re.MULTILINE) and "CPU:" in out and "GPU" in out


@pytest.mark.parametrize("command, sleeps", [("env", True), ("bench", False)])
def test_threads_sleep_soon_beside_other_programs_but_where_they_are_measured(monkeypatch, command, sleeps):
    seen = []
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is as it was afterwards
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setattr(__main__, f"run_{command}", lambda args: seen.append(os.environ.get("GOMP_SPINCOUNT")))
    assert __main__.main([command]) == 0
    assert seen == ["2000" if sleeps else None]


def test_command_generate_streams_and_reports(model_path):
    run = nanovllm_command("generate", "Hello", "--model", str(model_path), "--max-tokens", "4", "--seed", "1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Hello")
    assert re.search(r"\[4 tokens, the first after [\d.]+ s, then [\d.]+ tokens/s; length\]", run.stderr)


def test_command_generate_where_there_is_no_token(model_path, monkeypatch, capsys):
    """The model's logits are NaN, say."""
    monkeypatch.setattr(LLM, "stream", lambda *args: iter([{"text": "", "token_ids": [], "finish_reason": "abort"}]))
    __main__.run_generate(SimpleNamespace(model=model_path, prompt="Hello", temperature=1.0, seed=None, max_tokens=4))
    assert capsys.readouterr().err.endswith("[0 tokens; abort]\n")


def test_command_generate_with_a_wrong_setting(model_path):
    run = nanovllm_command("generate", "Hello", "--model", str(model_path), "--max-tokens", "0")
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("nanovllm: max_tokens must be at least 1, not 0")
    assert "Traceback" not in run.stderr


def test_command_generate_with_a_missing_model():
    run = nanovllm_command("generate", "Hello", "--model", "/no/such/folder", HF_HUB_OFFLINE="1")
    assert run.returncode == 1
    assert "'/no/such/folder' is not a folder here" in run.stderr and "Traceback" not in run.stderr


def test_command_chat_ends_at_end_of_input(model_path):
    run = nanovllm_command("chat", "--model", str(model_path))
    assert run.returncode == 0, run.stderr
    assert "ends the conversation" in run.stdout


@pytest.mark.parametrize("chapter", [c for c in CHAPTERS if c.path.is_file()], ids=lambda chapter: chapter.name)
def test_the_readme_shows_every_chapter(chapter):
    """A row with its first picture, its name and its question."""
    (row,) = [
        line for line in (ROOT / "README.md").read_text().splitlines() if f"notebooks/{chapter.name}.ipynb)**" in line
    ]
    picture = re.search(r"images/[0-9a-z_]+\.png", nbformat.read(chapter.path, as_version=4).cells[0].source).group()
    assert f'<img src="notebooks/{picture}"' in row and f"**[{chapter.name[:2]} {chapter.title}]" in row
    assert chapter.question in row
