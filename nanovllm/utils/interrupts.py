"""Signals at a moment that suits us: Ctrl-C, and others with handlers that may raise, wherever Python happens to be."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

# Besides Ctrl-C those for which programs have handlers: to end in good order, or after some time.
NAMES = ("SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2")
OTHERS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows has fewer


@contextmanager
def deferred(signums: Iterable[int]) -> Iterator[None]:
    """Let signals that have a handler in Python wait for the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    received: list[int] = []
    found = {signum: signal.getsignal(signum) for signum in signums}
    handlers = {signum: handler for signum, handler in found.items() if callable(handler)}
    for signum in handlers:
        signal.signal(signum, lambda signum, frame: received.append(signum))
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for signum in received:
            signal.raise_signal(signum)


# Ctrl-C, or Jupyter's stop button, waits for the end of the block.
interrupts_deferred = partial(deferred, [signal.SIGINT])

# The others wait, where Ctrl-C does already: bookkeeping is never left half done. Not while something may hang, of
# which an alarm must be able to free us.
signals_deferred = partial(deferred, OTHERS)
