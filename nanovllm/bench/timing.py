"""How time is taken: the best of several runs in turns, part by part, and with an eye on who else uses the machine."""

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import psutil
import torch

PATIENCE = 15.0  # seconds after which a comparison ends, once it has made three rounds


def best_of(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each side's fastest run. They take turns, so that a slow spell of the machine meets them all."""
    for side in sides.values():
        side()  # warm-up
    best = dict.fromkeys(sides, math.inf)
    begin = perf_counter()
    for i in range(rounds):
        for name, side in sides.items():
            start = perf_counter()
            side()
            best[name] = min(best[name], perf_counter() - start)
        if i >= 2 and perf_counter() - begin > PATIENCE:
            break
    return best


def seconds_on_gpu(function: Callable[[], Any], repeats: int = 10) -> float:
    """Median seconds on the GPU, by its own clock."""
    times = []
    for _ in range(3 + repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times[3:])


@contextmanager
def stopwatch(parts: list[tuple[str, Any, str]]) -> Iterator[dict[str, float]]:
    """For the duration of a `with` block, add up the seconds spent in methods of objects, in the dict that it gives.

    `parts` are (name in the dict, object, name of its method); several may share a name.
    """
    seconds = {name: 0.0 for name, _, _ in parts}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = perf_counter()
            result = function(*args)
            seconds[name] += perf_counter() - start
            return result

        return call

    for name, owner, method in parts:
        setattr(owner, method, timed(name, getattr(owner, method)))  # hides the class's method
    try:
        yield seconds
    finally:
        for _, owner, method in parts:
            delattr(owner, method)


@contextmanager
def watch_others() -> Iterator[dict[str, float]]:
    """How much others disturbed during a `with` block: afterwards "others_cores" and "python_ms" in the dict it gives.

    The cores that other programs kept busy; and the milliseconds of a small loop right after the block, which tell of
    those whom nobody here sees: guests of the same computer, who share its cores or its clock rate.
    """
    load: dict[str, float] = {}
    start, others = perf_counter(), others_seconds()
    yield load
    load["others_cores"] = round(max(0.0, (others_seconds() - others) / (perf_counter() - start)), 2)
    load["python_ms"] = round(1000 * best_of({"loop": small_loop}, rounds=3)["loop"], 2)


def small_loop() -> None:
    for _ in range(100_000):
        pass


def others_seconds() -> float:
    """CPU time since this machine was started that went to other programs, or to other virtual machines beside it."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    busy = sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "steal"))
    return busy - own.user - own.system
