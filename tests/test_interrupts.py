"""Signals that wait: all handlers are back at the end of the block, and all signals are told, whatever raises."""

import signal
from itertools import count

import pytest

from nanovllm.utils import interrupts
from nanovllm.utils.interrupts import interrupts_deferred, signals_deferred, uninterrupted


class Late(Exception):
    """What the handler of an alarm raises."""


@pytest.fixture
def told():
    """The signals that handlers were told of; that of SIGALRM raises, as one that limits a call's time does."""
    told = []

    def alarm(signum, frame):
        told.append(signum)
        raise Late

    handlers = {signal.SIGINT: told_of(told), signal.SIGTERM: told_of(told), signal.SIGALRM: alarm}
    previous = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    yield told
    assert {signum: signal.getsignal(signum) for signum in handlers} == handlers, "each has its own handler again"
    for signum, handler in previous.items():
        signal.signal(signum, handler)


def told_of(told):
    return lambda signum, frame: told.append(signum)


def test_a_signal_waits_for_the_end_of_the_block(told):
    with interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert told == [signal.SIGTERM], "the others do not wait"
    assert told == [signal.SIGTERM, signal.SIGINT]


def test_each_block_waits_for_the_one_around_it(told):
    with uninterrupted():
        with signals_deferred():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert told == []
    assert told == [signal.SIGTERM, signal.SIGINT]


def test_a_handler_that_raises_does_not_hide_the_next_signal(told):
    with pytest.raises(Late), uninterrupted():
        signal.raise_signal(signal.SIGALRM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert told == [signal.SIGALRM, signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("deferred", [interrupts_deferred, signals_deferred, uninterrupted])
@pytest.mark.parametrize("moment", range(1, 13))
def test_handlers_are_put_back_whenever_another_one_raises(told, monkeypatch, deferred, moment):
    """A signal that does not wait may come between any two replacements: `moment` counts them, in and out."""
    numbers, real = count(1), signal.signal

    def replace(signum, handler):
        real(signum, handler)
        if next(numbers) == moment:
            raise Late

    with monkeypatch.context() as patch:
        patch.setattr(interrupts.signal, "signal", replace)
        try:
            with deferred():
                pass
        except Late:
            pass
