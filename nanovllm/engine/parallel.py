"""Tensor parallelism: several ranks, each a process with its part of the model, are started, fed, watched and ended.

The process in which the user is plans the steps and has no part of the model. It tells every rank the same over a pipe,
and every rank answers. Under torchrun, the others' pipes are connections to other hosts (`docs/distributed.md`).
"""

import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PretrainedConfig

from nanovllm.config import Config
from nanovllm.engine.kv_cache import MemoryUse
from nanovllm.engine.model_runner import ModelRunner, resolve_device
from nanovllm.engine.rank import Report, serve
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.step_inputs import InputCollector
from nanovllm.engine.torchrun import accept, connect, is_torchrun
from nanovllm.utils.children import environment_of_a_child
from nanovllm.utils.interrupts import interrupts_deferred

logger = logging.getLogger(__name__)

PATIENCE = 1.0  # seconds to hear what the other ranks have to say when one has failed
LOG_TAIL = 2000  # bytes of what a rank has written before it died


def make_runner(config: Config, hf_config: PretrainedConfig, path: Path) -> Any:
    """The `ModelRunner` of an engine, or a `ParallelRunner` for several ranks. ValueError if the model does not divide.

    In a process that torchrun has started as another rank than the first, this does the rank's work, and then exits.
    """
    size, world_size = config.tensor_parallel_size, int(os.environ["WORLD_SIZE"]) if is_torchrun() else 1
    if size == 1:
        if world_size > 1:
            logger.warning(
                f"torchrun has started {world_size} processes, but tensor_parallel_size is 1: each makes an engine of "
                f"its own, with the whole model, here on device {config.device!r}; to share it say "
                f"tensor_parallel_size={world_size}"
            )
        return ModelRunner(config, hf_config, path)
    check_shares(hf_config, size)
    if is_torchrun():
        if world_size != size:
            raise ValueError(f"torchrun has started {world_size} processes, but tensor_parallel_size is {size}")
        if (rank := int(os.environ["RANK"])) > 0:
            sys.exit(serve(connect(rank), rank, config, path, None))
    return ParallelRunner(config, path)


def check_shares(hf_config: PretrainedConfig, size: int) -> None:
    """ValueError, with the sizes that would do, unless a model can be shared by `size` ranks."""
    num_heads, num_kv_heads = hf_config.num_attention_heads, hf_config.num_key_value_heads
    width = hf_config.intermediate_size

    def fits(size: int) -> bool:
        shares_kv_heads = num_kv_heads % size == 0 or size % num_kv_heads == 0
        return num_heads % size == 0 and width % size == 0 and shares_kv_heads

    if not fits(size):
        sizes = ", ".join(str(n) for n in range(1, num_heads + 1) if fits(n))
        raise ValueError(
            f"tensor_parallel_size is {size}, but this model has {num_heads} attention heads, {num_kv_heads} KV heads "
            f"and an intermediate size of {width}, which must divide evenly; sizes that do: {sizes}"
        )


class RemoteStep:
    """A step that all ranks have been told of."""

    def __init__(self, runner: "ParallelRunner", number: int) -> None:
        self._runner, self._number = runner, number
        self.logprobs: dict[int, dict[int, float]] = {}
        self.times: dict[str, float] = {}
        self.graph: dict[str, int] | None = None

    def tokens(self) -> list[int]:
        """Wait for it, as `LaunchedStep.tokens` does; steps are waited for in the order in which they were launched.

        A rank says nothing of a step before it is asked: if it did, one whose answer is longer than a pipe holds would
        wait for us to read it, while we wait for it to read of the next step.
        """
        token_ids, self.logprobs, self.times, self.graph = self._runner.ask("tokens", self._number)[0]
        return token_ids


class ParallelRunner:
    """Stands for the ranks' model runners: what it is asked, it asks of them.

    RuntimeError if a rank dies or fails: it names the rank, all are ended, and this engine is of no more use.
    """

    def __init__(self, config: Config, path: Path) -> None:
        self.size = config.tensor_parallel_size
        self.device = resolve_device(config.device)
        if self.device.index is not None:
            raise ValueError(
                f"device is {config.device!r}, but tensor_parallel_size is {self.size}; use "
                f"device={self.device.type!r}, and CUDA_VISIBLE_DEVICES to choose among GPUs"
            )
        if self.device.type == "cuda" and not is_torchrun() and self.size > torch.cuda.device_count():
            raise ValueError(
                f"tensor_parallel_size is {self.size}, but there are {torch.cuda.device_count()} GPUs here; "
                "lower it, or use device='cpu' or torchrun"
            )
        self.collector: InputCollector = InputCollector(config.max_num_seqs)
        self._numbers: Iterator[int] = count()  # of steps
        self.failure: str | None = None
        self.processes: list[subprocess.Popen] = []
        self.connections: list[Connection] = []
        self.logs: list[Any] = []  # what the processes have written
        weakref.finalize(self, abandon, self.processes, self.connections, self.logs)  # if nobody closes it
        try:
            with tempfile.TemporaryDirectory(prefix="nanovllm-") as folder:
                if is_torchrun():
                    self.start(config, path, None, num_children=1)
                    self.connections += accept(self.size)
                else:
                    self.start(config, path, f"{folder}/ranks", num_children=self.size)
                ready = self.receive()
        except BaseException:
            self.close(is_failure=True)
            raise
        self.num_blocks: int
        self.dtype: torch.dtype
        self.device_name: str
        self.memory: MemoryUse  # of the first rank
        self.can_overlap: bool
        self.num_blocks, self.dtype, self.device_name, self.memory, self.can_overlap = ready[0][0]
        if self.device.type == "cuda":  # each has logged this, too, but nobody sees that
            for rank, ((_, _, device_name, _, _), took) in enumerate(ready):
                logger.info("rank %d of %d, on %s: %s", rank, self.size, device_name, took)

    @interrupts_deferred()
    def start(self, config: Config, path: Path, store: str | None, num_children: int) -> None:
        """Start ranks as processes, which share as many threads as this one has."""
        environment = environment_of_a_child(OMP_NUM_THREADS=str(max(1, torch.get_num_threads() // num_children)))
        if store is not None:  # all on this computer, whatever it is called in whatever network it is in
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        config = replace(config, scheduler=None)  # that may be a class of the user's, and they have no use for it
        # The first rank's progress bars are seen where ours would be, and stand for all.
        with open(os.dup(2), "wb") as shown:
            for rank in range(num_children):
                ours, theirs = Pipe()
                log = tempfile.TemporaryFile()
                about = map(str, (theirs.fileno(), os.getpid(), shown.fileno()))
                process = subprocess.Popen(
                    [sys.executable, "-m", "nanovllm.engine.rank", *about],
                    pass_fds=[theirs.fileno(), shown.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # Ctrl-C in a terminal, or Jupyter's stop button, is for us alone
                )
                theirs.close()
                self.processes.append(process)
                self.connections.append(ours)
                self.logs.append(log)
        for rank, connection in enumerate(self.connections):
            self.tell(connection, pickle.dumps((rank, config, path, store)))

    # -- Asking --------------------------------------------------------------------------------------------------------

    def launch(self, batch: Batch) -> RemoteStep:
        """Start a step on all ranks, as `ModelRunner.launch` does on one."""
        number = next(self._numbers)
        self.send("run", number, self.collector.collect(batch))
        return RemoteStep(self, number)

    def describe(self) -> list[dict[str, Any]]:
        """What each rank holds and has exchanged so far: see `ModelRunner.describe`."""
        with interrupts_deferred():
            return [description for (description,) in self.ask("describe")]

    def ask(self, *question: Any) -> list[Any]:
        """All ranks' answers to a question."""
        with self.whole_exchange():
            self.send(*question)
            return self.receive()

    def send(self, *message: Any) -> None:
        """Tell all ranks the same."""
        if self.failure is not None:
            raise RuntimeError(self.failure)
        data = pickle.dumps(message)
        with self.whole_exchange():
            for connection in self.connections:
                self.tell(connection, data)

    def tell(self, connection: Connection, message: bytes) -> None:
        try:
            connection.send_bytes(message)
        except ConnectionError as error:
            self.fail({}, Report(self.connections.index(connection), 0.0, f"does not listen any more: {error}"))

    def receive(self) -> list[Any]:
        """One answer of each rank."""
        answers: dict[int, Any] = {}
        while len(answers) < self.size:
            answers |= self.hear(answers)
            if reports := {rank: answer for rank, answer in answers.items() if isinstance(answer, Report)}:
                self.fail(reports)
        return [answers[rank] for rank in range(self.size)]

    @contextmanager
    def whole_exchange(self) -> Iterator[None]:
        """An exception in the middle, as from an alarm's handler, ends this engine: who has heard what is unknown."""
        try:
            yield
        except BaseException as error:
            closed = self.failure
            self.close(is_failure=True)
            if closed is not None and isinstance(error, (EOFError, OSError)):
                raise RuntimeError(closed) from None  # another thread has closed it, and its connections
            raise

    def hear(self, heard: Collection[int], timeout: float | None = None) -> dict[int, Any]:
        """Wait until a rank that is not among `heard` says something, or several do; a `Report` is a failure."""
        connections = [connection for rank, connection in enumerate(self.connections) if rank not in heard]
        answers: dict[int, Any] = {}
        for connection in wait(connections, timeout):
            rank = self.connections.index(connection)  # type: ignore[arg-type]
            try:
                answers[rank] = connection.recv()  # type: ignore[union-attr, call-arg]
            except (EOFError, OSError) as error:
                if self.failure is not None or isinstance(error, TimeoutError):  # not the rank's: see whole_exchange
                    raise
                answers[rank] = self.obituary(rank)
        return answers

    # -- When it ends --------------------------------------------------------------------------------------------------

    def fail(self, reports: dict[int, Report], otherwise: Report | None = None) -> NoReturn:
        """A rank has failed. Others then do, too: hear them all, for a short while, and name the one that was first.

        If none has anything to say, it was `otherwise`.
        """
        if self.failure is not None:  # another thread has closed this engine
            raise RuntimeError(self.failure)
        deadline = time.monotonic() + PATIENCE
        while len(reports) < self.size and (left := deadline - time.monotonic()) > 0:
            reports |= {rank: answer for rank, answer in self.hear(reports, left).items() if isinstance(answer, Report)}
        first = min(reports.values(), key=lambda report: report.when, default=otherwise)
        assert first is not None
        self.close(is_failure=True)
        self.failure = f"rank {first.rank} of {self.size} {first.text}; this engine has ended, make a new LLM"
        raise ValueError(first.text) if first.is_users else RuntimeError(self.failure)

    def obituary(self, rank: int) -> Report:
        """How a rank died that has not said why: before any error that was reported, for it may have caused that.

        Only if it aborted itself it was not the first: NCCL does that to a process whose partner has failed.
        """
        first, now = -1.0, time.time()
        if rank >= len(self.processes):
            return Report(rank, first, "has closed its connection")
        try:
            code = self.processes[rank].wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return Report(rank, first, "has closed its pipe")
        names = {number.value: number.name for number in signal.Signals}
        how = f"was killed by {names.get(-code, f'signal {-code}')}" if code < 0 else f"ended with exit code {code}"
        log = self.logs[rank]
        log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL))
        written = log.read().decode(errors="replace").strip()
        text = f"{how}; the last that it wrote:\n{written}\n" if written else how
        return Report(rank, now if code == -signal.SIGABRT else first, text)

    @interrupts_deferred()
    def close(self, is_failure: bool = False) -> None:
        """End all ranks. Twice is fine, also after a first time that was cut short."""
        self.failure = self.failure or "this engine has been closed; make a new LLM"
        end(self.processes, self.connections, self.logs, is_failure)


def abandon(processes: list[subprocess.Popen], connections: list[Connection], logs: list[Any]) -> None:
    """End the ranks of an engine that nobody has closed: it is deleted, or the script is at its end."""
    end(processes, connections, logs, is_failure=hasattr(sys, "last_type"))


def end(processes: list[subprocess.Popen], connections: list[Connection], logs: list[Any], is_failure: bool) -> None:
    """Kill the ranks that are ours: one may hang, and none has to tidy.

    Those that torchrun has started are told to end; or not, and then fail as we do when their connections are closed.
    """
    for connection in [] if is_failure else connections[len(processes) :]:
        with suppress(OSError):
            connection.send(("end",))
    for process in processes:
        process.kill()
    for file in [*connections, *logs]:
        file.close()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):  # one that hangs in a driver does not even die
            process.wait(10 * PATIENCE)
