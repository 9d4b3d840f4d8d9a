"""Under torchrun: the processes that it has started, perhaps on several hosts, find each other.

It starts one for each rank, and all run the user's script. The first goes on with it. The others stop where the script
makes its `LLM`: there they call the first and become ranks. What they are told comes over that connection.
"""

import os
import secrets
from contextlib import suppress
from datetime import timedelta
from functools import cache
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

import torch.distributed as dist

WAIT = timedelta(hours=1)  # for another host, which may have to fetch the model


def is_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@cache  # the first process keeps it open as long as it lives
def torchrun_store(is_first: bool = False) -> dist.Store:
    """Where the processes leave word for each other. torchrun keeps it or, as with PyTorch 2.4, the first of them."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    keeps = is_first and os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "False"
    store = dist.TCPStore(*address, is_master=keeps, wait_for_workers=False, timeout=WAIT)
    return dist.PrefixStore(f"nanovllm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def accept(size: int) -> list[Connection]:
    """The first process's connections to ranks 1 to `size - 1`, which are told where to call."""
    store, key = torchrun_store(is_first=True), secrets.token_bytes(32)
    if store.add("engines", 1) > 1:
        raise RuntimeError("under torchrun a script makes one LLM: the other ranks ended with the first")
    by_rank: dict[int, Connection] = {}
    with Listener(("", 0), backlog=size, authkey=key) as listener:
        store.set("driver", f"{listener.address[1]} {key.hex()}")
        while len(by_rank) < size - 1:
            with suppress(AuthenticationError, EOFError, OSError):  # a stranger: anybody in the network can call
                connection = listener.accept()
                by_rank[connection.recv()] = connection
    return [by_rank[rank] for rank in range(1, size)]


def connect(rank: int) -> Connection:
    """A rank's connection to the first process, which is on the host that torchrun calls the master."""
    port, key = torchrun_store().get("driver").decode().split()
    connection = Client((os.environ["MASTER_ADDR"], int(port)), authkey=bytes.fromhex(key))
    connection.send(rank)
    return connection
