"""Signals at a moment that suits us: Ctrl-C, and others with handlers that may raise, wherever Python happens to be."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

# Besides Ctrl-C those for which programs have handlers: to end in good order, or after some time.
NAMES = ("SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2")
OTHERS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows has fewer


def is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def deferred(signums: Iterable[int]) -> Iterator[None]:
    """Let signals that have a handler in Python wait for the end of the block."""
    if not is_main_thread():
        yield  # nobody else is interrupted
        return
    received: list[int] = []
    handlers: dict[int, Any] = {}
    raised: BaseException | None = None
    try:
        for signum in signums:
            if callable(handler := signal.getsignal(signum)):
                handlers[signum] = handler  # noted first: a signal that does not wait may raise at the next line
                signal.signal(signum, lambda signum, frame: received.append(signum))
        yield
    finally:
        # All are put back and told, whatever one of them raises. (A call lets signals in: it stands inside of `try`.)
        while handlers or received:
            try:
                if not is_main_thread():
                    break  # the garbage collector ends this elsewhere, where nothing can be put back
                for signum in list(handlers):
                    signal.signal(signum, handlers[signum])
                    del handlers[signum]
                while received:
                    signal.raise_signal(received.pop(0))
            except BaseException as error:
                raised = error
        try:
            if raised is not None:
                raise raised
        finally:
            del raised  # it holds this frame, and would be held by it


# Ctrl-C, or Jupyter's stop button, waits for the end of the block.
interrupts_deferred = partial(deferred, [signal.SIGINT])

# The others wait, where Ctrl-C does already: bookkeeping is never left half done. Not while something may hang, of
# which an alarm must be able to free us.
signals_deferred = partial(deferred, OTHERS)

# Bookkeeping between steps, where Ctrl-C does not wait yet.
uninterrupted = partial(deferred, [signal.SIGINT, *OTHERS])
