"""Tensor parallelism: several ranks, each a process with its part of the model, are started, fed, watched and ended.

The process in which the user is plans the steps and has no part of the model. It tells every rank the same over a pipe,
and every rank answers. Each is started as `python -m nanovllm.engine.parallel`: a new interpreter, and not a copy of this
one, so that it works in a notebook, in a script without a `__main__` guard, and several times in one process.

Under `torchrun`, which starts a process for each rank itself, on several hosts, the first of these is where the user is,
and the others connect to it (`docs/distributed.md`).
"""

import os
import pickle
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Client, Connection, Listener, Pipe, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from nanovllm.config import Config
from nanovllm.engine.kv_cache import MemoryUse
from nanovllm.engine.model_runner import ModelRunner, resolve_device
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.step_inputs import InputCollector
from nanovllm.utils.checkpoint import load_hf_config
from nanovllm.utils.interrupts import interrupts_deferred
from nanovllm.utils.ranks import Ranks

PATIENCE = 1.0  # seconds to hear what the other ranks have to say when one has failed
TIME_TO_END = 5.0  # seconds that a rank has to end by itself
WATCH = 0.5  # seconds between two looks at whether the parent is alive
LOG_TAIL = 2000  # bytes of what a rank has written before it died


def make_runner(config: Config, hf_config: PretrainedConfig, path: Path) -> Any:
    """The `ModelRunner` of an engine, or a `ParallelRunner` for several ranks. ValueError if the model does not divide.

    In a process that torchrun has started as another rank than the first, this does the rank's work, and then exits.
    """
    size = config.tensor_parallel_size
    if size == 1:
        return ModelRunner(config, hf_config, path)
    check_shares(hf_config, size)
    is_under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if is_under_torchrun:
        world_size = int(os.environ["WORLD_SIZE"])
        if world_size != size:
            raise ValueError(f"torchrun has started {world_size} processes, but tensor_parallel_size is {size}")
        if (rank := int(os.environ["RANK"])) > 0:
            sys.exit(serve(connect(rank), rank, config, path, None))
    return ParallelRunner(config, path, is_under_torchrun)


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


# -- The process where the user is -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Report:
    """A rank's last word, or that there was none."""

    rank: int
    when: float  # by a clock that all processes share
    text: str
    is_users: bool = False  # the mistake: a ValueError that speaks for itself


class RemoteStep:
    """A step that all ranks have been told of."""

    def __init__(self, runner: "ParallelRunner") -> None:
        self._runner = runner
        self.logprobs: dict[int, dict[int, float]] = {}
        self.times: dict[str, float] = {}

    def tokens(self) -> list[int]:
        """Wait for it, as `LaunchedStep.tokens` does; steps are waited for in the order in which they were launched."""
        token_ids, self.logprobs, self.times = self._runner.receive()[0]
        return token_ids


class ParallelRunner:
    """Stands for the ranks' model runners: what it is asked, it asks of them.

    RuntimeError if a rank dies or fails: it names the rank, all are ended, and this engine is of no more use.
    """

    def __init__(self, config: Config, path: Path, is_under_torchrun: bool) -> None:
        self.size = config.tensor_parallel_size
        self.device = resolve_device(config.device)
        if self.device.index is not None:
            raise ValueError(
                f"device is {config.device!r}, but tensor_parallel_size is {self.size}; use device={self.device.type!r}, "
                "and CUDA_VISIBLE_DEVICES to choose among GPUs"
            )
        if self.device.type == "cuda" and not is_under_torchrun and self.size > torch.cuda.device_count():
            raise ValueError(
                f"tensor_parallel_size is {self.size}, but there are {torch.cuda.device_count()} GPUs here; "
                "lower it, or use device='cpu' or torchrun"
            )
        self.collector: InputCollector = InputCollector(config.max_num_seqs)
        self.failure: str | None = None
        self.processes: list[subprocess.Popen] = []
        self.connections: list[Connection] = []
        self.logs: list[Any] = []  # what the processes have written
        self._end: weakref.finalize = weakref.finalize(self, end, self.processes, self.connections)
        try:
            with tempfile.TemporaryDirectory(prefix="nanovllm-") as folder:
                if is_under_torchrun:
                    self.start(config, path, None, num_children=1)
                    self.connections += accept(self.size)
                else:
                    self.start(config, path, f"{folder}/ranks", num_children=self.size)
                ready = self.receive()
        except BaseException:
            self.close()
            raise
        self.num_blocks: int
        self.dtype: torch.dtype
        self.device_name: str
        self.memory: MemoryUse  # of the first rank
        self.num_blocks, self.dtype, self.device_name, self.memory = ready[0]

    def start(self, config: Config, path: Path, store: str | None, num_children: int) -> None:
        """Start ranks as processes, with as many threads each as this one has for all of them."""
        environment = os.environ | {
            "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self.size)),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        }
        if store is not None:  # all on this computer, whatever it is called in whatever network it is in
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        config = replace(config, scheduler=None)  # that may be a class of the user's, and they have no use for it
        for rank in range(num_children):
            ours, theirs = Pipe()
            log = tempfile.TemporaryFile()
            process = subprocess.Popen(
                [sys.executable, "-m", "nanovllm.engine.parallel", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
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
        self.send("run", self.collector.collect(batch))
        return RemoteStep(self)

    def describe(self) -> list[dict[str, Any]]:
        """What each rank holds and has exchanged so far: see `ModelRunner.describe`."""
        with interrupts_deferred():
            self.send("describe")
            return [description for (description,) in self.receive()]

    def send(self, *message: Any) -> None:
        """Tell all ranks the same."""
        if self.failure is not None:
            raise RuntimeError(self.failure)
        data = pickle.dumps(message)
        for connection in self.connections:
            self.tell(connection, data)

    def tell(self, connection: Connection, message: bytes) -> None:
        try:
            connection.send_bytes(message)
        except OSError:
            self.fail({})

    def receive(self) -> list[Any]:
        """The answers of all ranks to what they have been told; to the oldest of it that they have not answered yet."""
        if self.failure is not None:
            raise RuntimeError(self.failure)
        answers: dict[int, Any] = {}
        while len(answers) < self.size:
            for rank, answer in self.hear(answers.keys()):
                if isinstance(answer, Report):
                    self.fail({rank: answer})
                answers[rank] = answer
        return [answers[rank] for rank in range(self.size)]

    def hear(self, others_than: Collection[int], timeout: float | None = None) -> list[tuple[int, Any]]:
        """What some ranks say first, and who they are; a `Report` is the last of one that has failed or died."""
        connections = [c for rank, c in enumerate(self.connections) if rank not in others_than]
        heard: list[tuple[int, Any]] = []
        for connection in wait(connections, timeout):
            rank = self.connections.index(connection)  # type: ignore[arg-type]
            try:
                answer = connection.recv()  # type: ignore[union-attr, call-arg]
            except (EOFError, OSError):
                answer = Report(rank, -1.0, self.obituary(rank))  # before any error, which it may have caused
            heard.append((rank, answer))
        return heard

    # -- When it ends --------------------------------------------------------------------------------------------------

    def fail(self, reports: dict[int, Report]) -> NoReturn:
        """A rank has failed. Others then do, too: hear them all, for a short while, and name the one that was first."""
        deadline = time.monotonic() + PATIENCE
        while len(reports) < self.size and (left := deadline - time.monotonic()) > 0:
            reports |= {rank: answer for rank, answer in self.hear(reports, left) if isinstance(answer, Report)}
        first = min(reports.values(), key=lambda report: report.when)
        for process in self.processes:
            process.kill()
        self.close()
        self.failure = f"rank {first.rank} of {self.size} {first.text}; this engine has ended, make a new LLM"
        raise ValueError(first.text) if first.is_users else RuntimeError(self.failure)

    def obituary(self, rank: int) -> str:
        """How a rank died that has not said why."""
        if rank >= len(self.processes):
            return "has closed its connection"
        try:
            code = self.processes[rank].wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return "has closed its pipe"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        log = self.logs[rank]
        log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL))
        written = log.read().decode(errors="replace").strip()
        return f"{how}; the last that it wrote:\n{written}\n" if written else how

    def close(self) -> None:
        """End all ranks. Twice is fine."""
        self._end()
        self.failure = self.failure or "this engine has been closed; make a new LLM"


def end(processes: Sequence[subprocess.Popen], connections: Sequence[Connection]) -> None:
    """Close the pipes, upon which a rank ends; those that have not in time are killed."""
    for connection in connections:
        connection.close()
    deadline = time.monotonic() + TIME_TO_END
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# -- A rank ------------------------------------------------------------------------------------------------------------


def serve(connection: Connection, rank: int, config: Config, path: Path, store: str | None) -> int:
    """A rank's life: build its part of the model, then do as it is told, until the pipe is closed. Its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever is at the other end decides what an interrupt ends
    runner = None
    try:
        ranks = join(rank, config, store)
        runner = ModelRunner(config, load_hf_config(path), path, ranks)
        connection.send((runner.num_blocks, runner.dtype, runner.device_name, runner.memory))
        while True:
            match connection.recv():
                case ("run", inputs):
                    step = runner.run(inputs)
                    connection.send((step.tokens(), step.logprobs, step.times) if rank == 0 else None)
                case ("describe",):
                    connection.send(runner.describe())
    except EOFError:
        return 0
    except Exception as error:
        when = time.monotonic()
        if runner is None and isinstance(error, ValueError):  # of a checkpoint or a setting, not ours
            report = Report(rank, when, str(error), is_users=True)
        else:
            report = Report(rank, when, f"failed:\n{traceback.format_exc()}")
        with suppress(OSError):  # nobody may be there to be told
            connection.send(report)
        return 1


def join(rank: int, config: Config, store: str | None) -> Ranks:
    """Meet the other ranks: at a file, or if there is none, where torchrun says."""
    size = config.tensor_parallel_size
    device = resolve_device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if store is None else rank)
        torch.cuda.set_device(device)
        config.device = str(device)
    meeting = torchrun_store() if store is None else dist.FileStore(store, size)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=meeting, rank=rank, world_size=size)
    return Ranks(rank, size, dist.group.WORLD)


def die_with(parent: int) -> None:
    """End this process as soon as the one that started it has, whatever it is doing."""
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)


def main() -> None:
    fd, parent = map(int, sys.argv[1:])
    threading.Thread(target=die_with, args=[parent], daemon=True).start()
    connection = Connection(fd)
    status = serve(connection, *connection.recv())
    os._exit(status)  # at once: the others learn that it has gone when its sockets close


# -- torchrun ----------------------------------------------------------------------------------------------------------


def torchrun_store() -> dist.Store:
    """Where processes that torchrun has started leave word for each other."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"nanovllm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def accept(size: int) -> list[Connection]:
    """The connections to ranks 1 to `size - 1`, which are told where to call."""
    key = secrets.token_bytes(32)
    with Listener(("", 0), authkey=key) as listener:
        torchrun_store().set("driver", f"{listener.address[1]} {key.hex()}")
        connections = dict(greet(listener) for _ in range(1, size))
    return [connections[rank] for rank in range(1, size)]


def greet(listener: Listener) -> tuple[int, Connection]:
    connection = listener.accept()
    return connection.recv(), connection


def connect(rank: int) -> Connection:
    """The connection of a rank to where the user is."""
    port, key = torchrun_store().get("driver").decode().split()
    connection = Client((os.environ["MASTER_ADDR"], int(port)), authkey=bytes.fromhex(key))
    connection.send(rank)
    return connection


if __name__ == "__main__":
    main()
