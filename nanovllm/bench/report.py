"""What the benchmarks have to say: about the machine, one record for each result, and all of them in a table."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch

from nanovllm.engine.model_runner import dtype_name

BUSY = 0.1  # cores that other programs may keep occupied before the table says so

Record = dict[str, Any]


def environment(path: Path, load_format: str) -> Record:
    """What is measured, where and when."""
    return {
        "measurement": "environment",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_average": round(psutil.getloadavg()[0], 2),  # of the last minute
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "model": path.name,
        "load_format": load_format,
    }


def cpu_name() -> str:
    """What the CPU calls itself; on Linux Python does not know."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def git_commit() -> str | None:
    """The commit that is measured, "-dirty" if files differ from it; None outside a git repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def gpu_record(measurement: str, value: float, unit: str, dtype: torch.dtype | None = None) -> Record:
    """What was measured on this computer's GPU, in the numbers of `dtype`, if of any."""
    name = "" if dtype is None else dtype_name(dtype)
    gpu = torch.cuda.get_device_name()
    return {"measurement": measurement, "dtype": name, "value": round(value, 3), "unit": unit, "gpu": gpu}


class Report:
    """Collects records, and shows each as soon as it is there.

    The first describes the environment. Every other one has a "measurement" and its "dtype"; the one figure that it is
    about, "value" in "unit"; "others_cores" and "python_ms", how much others disturbed; "at_least" or "at_most" if
    there is a bar to reach; and whatever else helps to understand the figure.
    """

    def __init__(self, out: Path | None = None) -> None:
        self.out = out
        self.records: list[Record] = []
        self._start = perf_counter()

    def add(self, record: Record) -> None:
        """Keep a record, print it as a JSON line, and append that to the file."""
        self.records.append(record)
        line = json.dumps(record)
        print(line, flush=True)
        if self.out is not None:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def progress(self, message: str) -> None:
        """Say on stderr what comes next: some of it takes a minute."""
        print(f"[{perf_counter() - self._start:4.0f} s] {message}", file=sys.stderr, flush=True)

    def table(self) -> Iterator[str]:
        """The lines of a Markdown table, and of a warning if other programs disturbed."""
        yield "| measurement | dtype | result | bar | reached |"
        yield "|---|---|---|---|---|"
        for record in self.records[1:]:
            bar, reached = bar_of(record)
            figure = f"{record['value']:.2f} {record['unit']}"
            yield f"| {record['measurement']} | {record['dtype']} | {figure} | {bar} | {reached} |"
        busiest = max(record.get("others_cores", 0.0) for record in self.records[1:])
        if busiest > BUSY:
            yield ""
            yield f"The machine was not quiet: other programs kept up to {busiest:.1f} of its cores busy. Try again."


def bar_of(record: Record) -> tuple[str, str]:
    """The bar of a record, and whether it is reached; empty if it has none."""
    if "at_least" in record:
        return f"≥ {record['at_least']:g}", "yes" if record["value"] >= record["at_least"] else "no"
    if "at_most" in record:
        return f"≤ {record['at_most']:g}", "yes" if record["value"] <= record["at_most"] else "no"
    return "", ""
