"""A device of our own: a second process that takes operators off a queue, as a GPU does.

Whoever launches does not wait; the device computes one operator after the other, and notes when. It shares nothing with
a GPU but that: it is there so that a reader without one can watch a queue run empty.

    device = Device()
    device.put("a", torch.ones(4))
    device.launch("add", "b", "a", "a")     # b = a + a: goes into the queue, and Python goes on
    device.get("b")                         # waits for all that was launched before
"""

import os
import pickle
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

from nanovllm.lessons.launches import Event, Launches

Call = tuple[str, ...]  # operator, name of what it writes, names of what it reads

LENGTH = struct.Struct("I")  # of the message that follows
PATIENCE = 0.01  # seconds for which the device looks at an empty queue without a pause, as a GPU does, before it sleeps
HAS_CORES = hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1  # of its own, for the device


class Device:
    """The launching side. A message is one write to a pipe; the pipe is the queue."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "nanovllm.lessons.device"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.launches: list[Event] = []
        self.shapes: dict[str, torch.Tensor] = {}  # what is on the device, without its numbers
        self.get("")  # it has started

    def launch(self, operator: str, output: str, *inputs: str) -> None:
        """Put one operator into the queue: `torch.<operator>` of the inputs, into the memory of the output.

        Before that PyTorch must do here what it does for a GPU: check shapes and types, and know those of the output.
        """
        start = perf_counter()
        result = getattr(torch, operator)(*(self.shapes[name] for name in inputs))
        is_new = output not in self.shapes or self.shapes[output].shape != result.shape
        self.shapes[output] = result
        self._launch(operator, start, "launch", (operator, output, *inputs), is_new)

    def load(self, calls: Sequence[Call]) -> None:
        """Give the device a list of calls to keep."""
        self._send("load", list(calls))

    def replay(self) -> None:
        """Put the whole list into the queue, as one message."""
        self._launch("replay", perf_counter(), "replay")

    def put(self, name: str, value: torch.Tensor) -> None:
        """Copy a tensor to the device. If there is one of that name, its memory is used again: its address stays."""
        self.shapes[name] = value.to("meta")
        self._send("put", name, value.numpy())

    def get(self, name: str) -> Any:
        """Wait until the queue is empty; returns the tensor called `name`, None if there is none."""
        self._send("get", name)
        return self._answer()

    def watch(self, work: Callable[[], Any]) -> Launches:
        """Do some work and wait for its end: when each launch was made, and when the device computed."""
        self._send("times")
        self._answer()  # what came before is not asked for
        self.launches = []
        with other_cores():
            work()
            self._send("times")
            kernels = [Event(*event) for event in self._answer()]
        return Launches(self.launches, kernels).from_zero()

    def fastest(self, work: Callable[[], Any], repeats: int = 20, **tensors: torch.Tensor) -> Launches:
        """Watch the same work so often, each time on these tensors; of the runs the fastest: others disturb."""
        runs = []
        for _ in range(repeats):
            for name, value in tensors.items():
                self.put(name, value)
            runs.append(self.watch(work))
        return min(runs, key=lambda run: run.seconds)

    def close(self) -> None:
        """End the process. Calling it twice is fine."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _launch(self, name: str, start: float, *message: Any) -> None:
        self._send(*message)
        self.launches.append(Event(name, start, perf_counter() - start))

    def _send(self, *message: Any) -> None:
        assert self.process.stdin is not None
        data = pickle.dumps(message)
        self.process.stdin.write(LENGTH.pack(len(data)) + data)
        self.process.stdin.flush()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return pickle.load(self.process.stdout)


@contextmanager
def other_cores() -> Iterator[None]:
    """Leave the device a core of its own for a while, or the system runs both on one, in turns."""
    if not HAS_CORES:
        yield
        return
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ours - {max(ours)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, ours)


# -- The second process ------------------------------------------------------------------------------------------------


def messages() -> Iterator[Any]:
    """What comes through the queue, until it is closed."""
    queue, data = sys.stdin.fileno(), b""
    if os.name == "posix":
        os.set_blocking(queue, False)
    seen = perf_counter()
    while True:
        while len(data) < LENGTH.size or len(data) < LENGTH.size + LENGTH.unpack_from(data)[0]:
            try:
                more = os.read(queue, 1 << 20)
            except BlockingIOError:
                if perf_counter() - seen > PATIENCE:
                    select.select([queue], [], [])
                continue
            if not more:
                return
            data, seen = data + more, perf_counter()
        end = LENGTH.size + LENGTH.unpack_from(data)[0]
        yield pickle.loads(data[LENGTH.size : end])
        data = data[end:]


def compute(memory: dict[str, torch.Tensor], call: Call, is_new: bool = False) -> None:
    """One operator, into memory that stays where it is once it is there."""
    operator, output, *inputs = call
    result = dict(out=None if is_new else memory[output])
    memory[output] = getattr(torch, operator)(*(memory[name] for name in inputs), **result)


@torch.inference_mode()
def serve() -> None:
    """What the second process does until its queue is closed. Its clock is that of the first: the machine's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a notebook's stop button is for the notebook
    torch.set_num_threads(1)
    if HAS_CORES:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    memory: dict[str, torch.Tensor] = {}
    graph: list[Call] = []
    times: list[tuple[str, float, float]] = []

    def timed(call: Call, is_new: bool = False) -> None:
        start = perf_counter()
        compute(memory, call, is_new)
        times.append((call[0], start, perf_counter() - start))

    for kind, *rest in messages():
        if kind == "launch":
            timed(*rest)
        elif kind == "replay":
            for call in graph:
                timed(call)
        elif kind == "load":
            graph = rest[0]
        elif kind == "put":
            name, value = rest[0], torch.from_numpy(rest[1])
            if name in memory and memory[name].shape == value.shape:
                memory[name].copy_(value)
            else:
                memory[name] = value
        else:
            found = memory.get(rest[0]) if kind == "get" else None
            answer, times = (times, []) if kind == "times" else (found, times)
            sys.stdout.buffer.write(pickle.dumps(answer))
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
