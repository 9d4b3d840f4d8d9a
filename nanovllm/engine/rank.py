"""A rank: a process that has its part of a model, and does as it is told over a pipe.

`nanovllm.engine.parallel` starts it as `python -m nanovllm.engine.rank`: a new interpreter and not a copy of the user's
process, so that it works in a notebook, in a script without a `__main__` guard, and several times in one process.
"""

import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.model_runner import ModelRunner, resolve_device
from nanovllm.engine.torchrun import torchrun_store
from nanovllm.utils.checkpoint import load_hf_config
from nanovllm.utils.ranks import Ranks

WATCH = 0.5  # seconds between two looks at whether the parent is alive
GRACE = 5.0  # seconds to end by itself, for a rank that has been told to


@dataclass(slots=True)
class Report:
    """A rank's last word, or that there was none."""

    rank: int
    when: float  # seconds by the wall clock, which hosts more or less share
    text: str
    is_users: bool = False  # the user's mistake: a ValueError that speaks for itself


def serve(connection: Connection, rank: int, config: Config, path: Path, store: str | None) -> int:
    """A rank's life: build its part of the model, then do as it is told, until the end. Its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever is at the other end decides what an interrupt ends
    messages: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=listen, args=[connection, messages], daemon=True).start()
    runner = None
    try:
        ranks = join(rank, config, store)
        runner = ModelRunner(config, load_hf_config(path), path, ranks)
        about = (runner.num_blocks, runner.dtype, runner.device_name, runner.memory, runner.can_overlap)
        connection.send((about, runner.what_it_took()))
        launched: dict[int, LaunchedStep] = {}
        while True:
            match messages.get():
                case ("run", number, inputs):
                    launched[number] = runner.run(inputs)
                case ("tokens", number):  # every rank waits for them, and so learns if its GPU has failed
                    step = launched.pop(number)
                    token_ids = step.tokens()
                    connection.send((token_ids, step.logprobs, step.times, step.graph) if rank == 0 else None)
                    launched = {n: later for n, later in launched.items() if n > number}  # for others nobody will ask
                case ("describe",):
                    connection.send(runner.describe())
                case ("end",):
                    return 0
                case Exception() as error:
                    raise error
    except Exception as error:
        when = time.time()
        if runner is None and isinstance(error, ValueError):  # of a checkpoint or a setting, not ours
            report = Report(rank, when, str(error), is_users=True)
        else:
            report = Report(rank, when, f"failed:\n{traceback.format_exc()}")
        with suppress(OSError):  # nobody may be there to be told
            connection.send(report)
        return 1


def listen(connection: Connection, messages: "SimpleQueue[Any]") -> None:
    """Take in what is said, also while a step computes: whoever speaks must not wait for a rank that may never hear it.

    It also ends this process, which may be waiting for another rank that is gone: a little later than it was told to
    end, or at once, as a failure, if the other end has gone without a word. If something that was said makes no sense,
    the exception is the last message.
    """
    message = None
    try:
        while message != ("end",):
            message = connection.recv()
            messages.put(message)
        time.sleep(GRACE)
        os._exit(0)
    except (EOFError, OSError):
        os._exit(1)
    except Exception as error:
        messages.put(error)


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
    fd, parent, shown = map(int, sys.argv[1:])
    threading.Thread(target=die_with, args=[parent], daemon=True).start()
    connection = Connection(fd)
    rank, *rest = connection.recv()
    if rank == 0:  # what Python writes is shown; what libraries write goes to the log, as that of the others
        sys.stderr = open(shown, "w", buffering=1)
    status = serve(connection, rank, *rest)
    os._exit(status)  # at once: the others learn that it has gone when its sockets close


if __name__ == "__main__":
    from nanovllm.engine import rank  # once more, under the name by which the other end knows a `Report`

    rank.main()
