"""The mutation check: faults are put into a copy of the package, and the chapters must notice.

    python -m tests.mutations                                 every fault on every chapter
    python -m tests.mutations preempts-first --chapters 02 04

A fault leaves the engine running and makes it do something wrong: other blocks, other tokens, another schedule. A
chapter notices it if a cell shows something else than what is saved, or if the chapter's own code fails, most often in
an `assert`. What does not count: a crash inside the engine (nobody needs a chapter to notice that), a cell that ran out
of time, and a cell that shows the package's source, which would notice any change.

The exit status is 1 if some fault is noticed by no chapter, 2 if the chapters are not green without any fault.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import nbformat

ROOT = Path(__file__).resolve().parent.parent
CELL_SECONDS = 90
CHAPTER_SECONDS = 600


@dataclass(frozen=True)
class Fault:
    """`text`, which occurs once in `file` of the package, becomes `replacement`; `wrong` says what that does."""

    name: str
    wrong: str
    file: str
    text: str
    replacement: str

    def put_into(self, package: Path) -> None:
        path = package / self.file
        source = path.read_text()
        assert source.count(self.text) == 1, f"{self.name}: {self.file} must hold this text once: {self.text!r}"
        path.write_text(source.replace(self.text, self.replacement))


FAULTS = [
    # -- Blocks --------------------------------------------------------------------------------------------------------
    Fault(
        "evicts-newest",
        "when no empty block is left, the block that was freed last is evicted, not the one freed first",
        "engine/block_manager.py",
        "self.free.popitem(last=False)",
        "self.free.popitem(last=self.blocks[next(iter(self.free))].hash is not None)",
    ),
    Fault(
        "head-before-tail",
        "a sequence's blocks are freed from the head on, so that its head is evicted before its tail",
        "engine/block_manager.py",
        "in reversed(seq.block_table):",
        "in seq.block_table:",
    ),
    Fault(
        "freed-twice",
        "a preempted sequence keeps its block table, goes on in blocks that may be another's, and frees them again",
        "engine/block_manager.py",
        "        seq.block_table = []\n        seq.num_computed_tokens = 0\n",
        "        seq.num_computed_tokens = 0\n",
    ),
    Fault(
        "shared-counted-once",
        "a shared block counts one holder, however many there are: the first to leave frees it",
        "engine/block_manager.py",
        "block.ref_count += 1",
        "block.ref_count = 1",
    ),
    Fault(
        "hash-without-parent",
        "a block's hash is of its tokens alone, whatever comes before them",
        "engine/block_manager.py",
        'xxh64_intdigest(f"{parent_hash}:".encode() + tokens)',
        "xxh64_intdigest(tokens)",
    ),
    Fault(
        "hit-not-verified",
        "whatever has the right hash is a hit, whether or not it has the right content",
        "engine/block_manager.py",
        "return block.parent == parent and block.tokens == tokens",
        "return True",
    ),
    Fault(
        "salt-dropped",
        "a request's cache salt is forgotten: all share with all",
        "engine/llm_engine.py",
        "replace(params, seed=secrets.randbits(63))",
        "replace(params, seed=secrets.randbits(63), cache_salt=None)",
    ),
    Fault(
        "hit-one-short",
        "a prompt that ends with the first token of a block misses its last cached block",
        "engine/block_manager.py",
        "range((len(seq.token_ids) - 1) // self.block_size)",
        "range((len(seq.token_ids) - 2) // self.block_size)",
    ),
    # -- Schedules -----------------------------------------------------------------------------------------------------
    Fault(
        "preempts-first",
        "when blocks run out, the sequence that came first gives way, not the last",
        "engine/scheduler.py",
        "seq = self.running.pop()",
        "seq = self.running.pop(0)",
    ),
    Fault(
        "answer-lost",
        "a preempted sequence forgets the tokens that it had generated",
        "engine/scheduler.py",
        "        self.waiting.appendleft(seq)\n",
        "        self.waiting.appendleft(seq)\n"
        "        del seq.token_ids[seq.num_prompt_tokens :], seq.block_hashes[:]\n"
        "        seq.num_tokens = seq.num_prompt_tokens\n",
    ),
    Fault(
        "running-cost-nothing",
        "the tokens of those who run are not taken off the budget",
        "engine/scheduler.py",
        "                self._add_to(batch, seq, num_new_tokens)\n                budget -= num_new_tokens\n",
        "                self._add_to(batch, seq, num_new_tokens)\n",
    ),
    Fault(
        "last-come-first-served",
        "whoever comes is put at the head of the queue",
        "engine/scheduler.py",
        "self.waiting.append(seq)",
        "self.waiting.appendleft(seq)",
    ),
    Fault(
        "one-sequence-fewer",
        "at most max_num_seqs - 1 sequences run at the same time (max_num_seqs = 1 still means one)",
        "engine/scheduler.py",
        "list(range(self.max_num_seqs))[::-1]",
        "list(range(max(1, self.max_num_seqs - 1)))[::-1]",
    ),
    # -- Slots and attention -------------------------------------------------------------------------------------------
    Fault(
        "slot-before-boundary",
        "the first token of a block is stored in the block before it",
        "engine/model_runner.py",
        "block_tables[rows, positions // self.block_size]",
        "block_tables[rows, np.maximum(positions - 1, 0) // self.block_size]",
    ),
    Fault(
        "mask-one-ahead",
        "in a chunk that follows cached tokens, each token also sees the one after it",
        "kernels/torch_attention.py",
        "triu_(num_visible - n + 1)",
        "triu_(num_visible - n + 2)",
    ),
    Fault(
        "chunk-positions-from-zero",
        "a chunk's tokens are rotated as if nothing came before them",
        "engine/model_runner.py",
        "input_ids, positions = self.to_device(inputs.input_ids), self.to_device(inputs.positions)",
        "input_ids, positions = self.to_device(inputs.input_ids), self.to_device(inputs.positions)\n"
        "            first = np.where(inputs.num_new > 1, inputs.context_lens - inputs.num_new, 0)[inputs.owner]\n"
        "            positions = positions - self.to_device(first)",
    ),
    # -- CUDA graphs ---------------------------------------------------------------------------------------------------
    Fault(
        "no-bucket-for-two",
        "there is no graph for two tokens: they take the one for four",
        "engine/buckets.py",
        "[1, 2, 4, *range(8, 513, 8)]",
        "[1, 4, *range(8, 513, 8)]",
    ),
    Fault(
        "padding-in-the-first-row",
        "a graph's padding has the block table of the first row, and overwrites its first token",
        "engine/cuda_graphs.py",
        "padding=[0, 0, self.padding_row]",
        "padding=[0, 0, 0]",
    ),
    Fault(
        "graph-one-token-short",
        "in a graph, no token sees itself",
        "engine/cuda_graphs.py",
        "context_lens=(positions + 1).int()",
        "context_lens=positions.clamp(min=1).int()",
    ),
    Fault(
        "padding-not-told",
        "a trace tells the bucket of a step where it should tell the padding",
        "engine/model_runner.py",
        '"padding": bucket - num_tokens',
        '"padding": bucket',
    ),
    # -- Several ranks -------------------------------------------------------------------------------------------------
    Fault(
        "kv-heads-in-turn",
        "fewer KV heads than ranks are dealt out in turn, and not to those whose queries read them",
        "utils/ranks.py",
        "first = self.rank * count // self.size",
        "first = self.rank % count if count < self.size else self.rank * count // self.size",
    ),
    Fault(
        "values-of-rank-0",
        "every rank reads rank 0's part of v_proj from the checkpoint",
        "utils/loader.py",
        "destination, start=share.start * width)",
        'destination, start=share.start * width * (part != "v_proj"))',
    ),
    Fault(
        "vocabulary-offset-forgotten",
        "each rank looks a token up as if its part of the vocabulary began at 0",
        "layers/embed_head.py",
        "rows = input_ids - self.tokens.start",
        "rows = input_ids",
    ),
    Fault(
        "partial-sums-not-added",
        "after a row-parallel product each rank goes on with its own partial sum",
        "layers/linear.py",
        "y = self.ranks.all_reduce(self.product(x, None))",
        "y = self.product(x, None)",
    ),
    Fault(
        "logits-from-the-last-rank-on",
        "the ranks' logits are put side by side in the wrong order",
        "utils/ranks.py",
        "return torch.cat(parts, dim=-1)",
        "return torch.cat(parts[::-1], dim=-1)",
    ),
    Fault(
        "traffic-in-numbers",
        "what ranks exchange is counted in numbers and called bytes",
        "utils/ranks.py",
        "self.bytes += x.nbytes",
        "self.bytes += x.numel()",
    ),
    # -- Counting, text and record -------------------------------------------------------------------------------------
    Fault(
        "values-not-counted",
        "the bytes of a block count keys and forget values",
        "engine/kv_cache.py",
        "return 2 * num_layers",
        "return num_layers",
    ),
    Fault(
        "dice-without-position",
        "a seeded request draws the same random number for every token",
        "engine/model_runner.py",
        "uniform_numbers(self.seed[rows], positions)",
        "uniform_numbers(self.seed[rows], 0 * positions)",
    ),
    Fault(
        "stop-string-kept",
        "a stop string that ends an answer stays in its text",
        "engine/detokenizer.py",
        "_, end = min(found)",
        "end, _ = min(found)",
    ),
    Fault(
        "trace-counts-after",
        "a trace tells how many tokens were computed after a step where it should tell how many before",
        "engine/recorder.py",
        "(s.seq.id, s.num_new_tokens, s.num_computed_tokens)",
        "(s.seq.id, s.num_new_tokens, s.seq.num_computed_tokens)",
    ),
]


@dataclass(frozen=True)
class Finding:
    """How a chapter went: `kind` is same, output, assertion, error, crash or timeout; `cell` the first that differs."""

    kind: str
    cell: str = ""

    @property
    def is_noticed(self) -> bool:
        return self.kind in ("output", "assertion", "error")

    def __str__(self) -> str:
        return {"same": "–", "output": f"`{self.cell}`"}.get(self.kind, f"{self.kind} `{self.cell}`")


# -- One chapter on one copy of the package ----------------------------------------------------------------------------


def copy_to(folder: Path, fault: Fault | None) -> None:
    """The package with the fault, and the chapters; each asserts in a new first cell that it imports this package."""
    shutil.copytree(ROOT / "nanovllm", folder / "nanovllm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    if fault is not None:
        fault.put_into(folder / "nanovllm")
    for path in (folder / "notebooks").glob("*.ipynb"):
        prepare(path, str(folder / "nanovllm" / "__init__.py"))


def prepare(path: Path, package: str) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if any(
            output.get("data", {}).get("text/plain", "").startswith("`nanovllm/") for output in cell.get("outputs", [])
        ):
            cell.metadata["tags"] = ["nbval-ignore-output"]  # it shows source
    code = f"import nanovllm\n\nassert nanovllm.__file__ == {package!r}"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(code, id="which-package", execution_count=1))
    nbformat.write(notebook, path)


def run(folder: Path, notebook: Path) -> Finding:
    """Run a chapter of the copy until a cell differs."""
    report = notebook.with_suffix(".xml")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--color=no",
        f"--junitxml={report}",
    ]
    command += ["--nbval", "--nbval-current-env", f"--nbval-cell-timeout={CELL_SECONDS}", str(notebook)]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTEST_ADDOPTS": ""}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=CHAPTER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Finding("timeout")
    if done.returncode == 0:
        return Finding("same")
    if done.returncode != 1:
        raise RuntimeError(f"pytest itself failed on {notebook}:\n{done.stdout}{done.stderr}")
    finding = judge(report.read_text(), nbformat.read(notebook, as_version=4))
    if finding.cell == "which-package":
        raise RuntimeError(f"the kernel of {notebook} does not import {folder / 'nanovllm'}")
    return finding


def judge(report: str, notebook: nbformat.NotebookNode) -> Finding:
    """Which cell differs, and how, by pytest's XML report."""
    code = [cell.id for cell in notebook.cells if cell.cell_type == "code"]
    failed = next(case for case in ElementTree.fromstring(report).iter("testcase") if case.find("failure") is not None)
    text = re.sub(r"#x1B\[[\d;]*m", "", failed.findtext("failure", ""))
    cell = code[int(failed.get("name", "").removeprefix("Cell "))]
    if "Cell outputs differ" in text:
        return Finding("output", cell)
    if "Timeout of" in text:
        return Finding("timeout", cell)
    # A traceback names the file of each frame. The chapters' helpers are part of the chapters.
    if re.search(r"/nanovllm/(?!lessons/)[\w/]+\.py:\d+", text):
        return Finding("crash", cell)
    return Finding("assertion" if re.search(r"^AssertionError", text, re.MULTILINE) else "error", cell)


# -- All of them -------------------------------------------------------------------------------------------------------


def check(faults: list[Fault | None], chapters: list[str], jobs: int) -> dict[tuple[str, str], Finding]:
    """Run each chapter with each fault; None is the package as it is. Tells each result as it comes."""
    findings, begun = {}, time.perf_counter()
    with TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        runs = {}
        for fault in faults:
            name = fault.name if fault else "no fault"
            copy = Path(folder).resolve() / name.replace(" ", "-")
            copy_to(copy, fault)
            for chapter in chapters:
                (notebook,) = (copy / "notebooks").glob(f"{chapter}_*.ipynb")
                runs[pool.submit(run, copy, notebook)] = name, chapter
        for i, future in enumerate(as_completed(runs), 1):
            name, chapter = runs[future]
            findings[name, chapter] = finding = future.result()
            seconds = time.perf_counter() - begun
            print(
                f"[{i}/{len(runs)}, {seconds:.0f} s] {name}, chapter {chapter}: {finding.kind} {finding.cell}",
                flush=True,
            )
    return findings


def table(faults: list[Fault], chapters: list[str], findings: dict[tuple[str, str], Finding]) -> str:
    """Faults by chapters, as markdown."""
    lines = [f"| fault | what goes wrong | {' | '.join(chapters)} |", "|---" * (2 + len(chapters)) + "|"]
    for fault in faults:
        cells = [str(findings[fault.name, chapter]) for chapter in chapters]
        lines.append(f"| {fault.name} | {fault.wrong} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="fault", help="faults (default: all)")
    written = sorted(path.name[:2] for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    parser.add_argument("--chapters", nargs="+", metavar="NN", choices=written, default=written)
    parser.add_argument("--jobs", type=int, default=1, help="notebooks that run at the same time")
    args = parser.parse_args()
    by_name = {fault.name: fault for fault in FAULTS}
    if unknown := set(args.names) - by_name.keys():
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(by_name)}")
    faults = [by_name[name] for name in args.names] or FAULTS

    start = time.perf_counter()
    baseline = check([None], args.chapters, args.jobs)
    if any(finding.kind != "same" for finding in baseline.values()):
        print("the chapters are not green without a fault")
        return 2
    findings = check([*faults], args.chapters, args.jobs)
    noticed = {name for (name, _), finding in findings.items() if finding.is_noticed}
    print(f"\n{table(faults, args.chapters, findings)}\n")
    print(f"{len(noticed)} of {len(faults)} faults noticed, in {(time.perf_counter() - start) / 60:.0f} minutes")
    return 0 if len(noticed) == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
