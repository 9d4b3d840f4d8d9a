"""Recordings: what a chapter shows of a machine that its reader may not have.

    python -m nanovllm.lessons record 05      on a GPU: writes notebooks/recordings/05_decode_step.json
    python -m nanovllm.lessons record 07      and 07_benchmark.json; where there are several GPUs 07_ranks.json, too

A recording is JSON. `about` says on what it was made, by which commit, by which command and when; a chapter prints that
under what it draws. On a GPU a chapter records afresh; elsewhere it plays what is stored.
"""

import json
import platform
import random
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from nanovllm import LLM
from nanovllm.bench import Size
from nanovllm.bench.gpu import SETTINGS, measure_gpu, qwen3_folder
from nanovllm.bench.ranks import measure_ranks
from nanovllm.bench.report import Report, environment, git_commit
from nanovllm.bench.steps import decoding, that_fit
from nanovllm.lessons.launches import Launches, from_profiler
from nanovllm.lessons.series import NOTEBOOKS

RECORDINGS = NOTEBOOKS / "recordings"
MAX_BYTES = 200_000

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DRAWN = (1, 256)  # the batch sizes of the timelines
CONTEXT_LEN = 1024
# So many steps are timed, of which the fastest is kept: neighbours on the machine only ever make them slower. Not one
# after the other but in rounds of all batch sizes, because they may do so for a while. What is drawn is a step in each
# round, and again the fastest.
ROUNDS, STEPS = 3, 10

Recording = dict[str, Any]


# -- A decode step, eager and from a graph -----------------------------------------------------------------------------


def decode_step() -> Recording:
    """Chapter 05: a decode step of a model with the sizes of Qwen3-0.6B, eager and from a CUDA graph."""
    recording: Recording = {"about": about("05"), "timelines": {}, "seconds": {}}
    for name, settings in {"eager": {"enforce_eager": True}, "graph": {}}.items():
        with qwen3_folder() as path:
            llm = LLM(path, load_format="dummy", **SETTINGS | settings)
        generator = random.Random(0)
        seconds: dict[int, list[float]] = {}
        drawn: dict[int, list[Launches]] = {}
        for n in ROUNDS * that_fit(Report(), llm, BATCH_SIZES, CONTEXT_LEN):
            with decoding(llm, n, CONTEXT_LEN, generator):
                seconds.setdefault(n, []).append(fastest_seconds(llm.step))
                if n in DRAWN:
                    drawn.setdefault(n, []).append(profiled(llm.step))
        for n, runs in drawn.items():
            recording["timelines"][f"{name}, batch {n}"] = min(runs, key=lambda run: run.seconds).to_dict()
        recording["seconds"][name] = {str(n): round(min(times), 6) for n, times in seconds.items()}
        if name == "graph":
            graphs = llm.engine.model_runner.graphs
            assert graphs is not None, "this GPU's engine has no CUDA graphs: its attention is not Triton's"
            recording["graphs"] = {
                "count": len(graphs.graphs) + len(graphs.sample_graphs),
                "pieces": sum(map(len, graphs.piecewise.pieces.values())),
                "bytes": llm.engine.model_runner.memory.graphs,
                "seconds": round(graphs.seconds, 2),
            }
            recording["memory"] = {
                kind: getattr(llm.engine.model_runner.memory, kind) for kind in ("weights", "graphs")
            }
        llm.close()
    return recording


def fastest_seconds(work: Callable[[], Any]) -> float:
    """Seconds of some work, which waits for the GPU by itself."""
    times = []
    for _ in range(STEPS):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return min(times)


def profiled(work: Callable[[], Any]) -> Launches:
    """What some work put into the GPU's queue, and what the GPU did: of the second run, for the first is slower."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return from_profiler(json.loads(path.read_text())["traceEvents"])


# -- A benchmark -------------------------------------------------------------------------------------------------------


def benchmark() -> Recording:
    """Chapter 07: the records of `nanovllm bench --load-format dummy`."""
    recording: Recording = {"about": about("07")}
    report = Report()
    with qwen3_folder() as path:
        report.add(environment(path, "dummy"))
        measure_gpu(report, path, "dummy", Size())
    return recording | {"records": report.records}


def ranks() -> Recording:
    """Chapter 07: what it measures of several GPUs."""
    made_on = about("07")
    made_on |= {"gpu": f"{torch.cuda.device_count()} x {made_on['gpu']}", "model": "sizes as told, random weights"}
    report = Report()
    measure_ranks(report)
    return {"about": made_on, "records": report.records}


# -- All recordings ----------------------------------------------------------------------------------------------------

MADE_BY: dict[str, Callable[[], Recording]] = {
    "05_decode_step": decode_step,
    "07_benchmark": benchmark,
    "07_ranks": ranks,  # on two GPUs or more
}


def about(chapter: str) -> dict[str, str]:
    """The machine, the versions, the commit, the command and the date."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "nanovllm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # Triton outside Linux
            pass
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": driver(),
        "cuda": str(torch.version.cuda),
        **versions,
        "model": "sizes of Qwen3-0.6B, random weights",
        "commit": git_commit() or "unknown",
        "command": f"python -m nanovllm.lessons record {chapter}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def driver() -> str:
    """The version of NVIDIA's driver, as its own tool tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def record(chapter: str) -> list[Path]:
    """Make the recordings of a chapter and write them. RuntimeError where there is no GPU: nothing is made up."""
    names = [name for name in MADE_BY if name.startswith(chapter)]
    if not names:
        raise ValueError(f"chapter {chapter} has no recordings; there are {', '.join(MADE_BY)}")
    if not torch.cuda.is_available():
        raise RuntimeError("a recording is made on a GPU, and torch finds none here")
    if torch.cuda.device_count() == 1:
        names = [name for name in names if MADE_BY[name] is not ranks]
    made = {name: MADE_BY[name]() for name in names}  # all of one commit: a file that is written makes it a dirty one
    return [write(name, recording) for name, recording in made.items()]


def write(name: str, recording: Recording) -> Path:
    """Save a recording, if it is small."""
    text = json.dumps(recording, separators=(",", ":"))
    if len(text) > MAX_BYTES:
        raise ValueError(f"the recording {name} has {len(text):,} bytes; {MAX_BYTES:,} are allowed")
    RECORDINGS.mkdir(exist_ok=True)
    path = RECORDINGS / f"{name}.json"
    path.write_text(text + "\n")
    return path


def recording(name: str) -> Recording:
    """A fresh recording where there is a GPU, else the stored one."""
    if torch.cuda.is_available():
        return MADE_BY[name]()
    return stored(name)


def stored(name: str) -> Recording:
    """A recording of the repository."""
    return json.loads((RECORDINGS / f"{name}.json").read_text())
