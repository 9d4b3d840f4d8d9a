"""Exercise checks: what a reader wrote is tried, and a sentence says how it went.

A check is a generator function that takes the reader's answer and a seed for its random cases, and yields a complaint
for each case that goes wrong. Only the first complaint is shown: one thing to mend at a time.
"""

import random
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any


class Verdict:
    """How an exercise went. `attempted` and `right` are for tests; the reader sees the sentence."""

    def __init__(self, sentence: str, attempted: bool = True, right: bool = False) -> None:
        self.sentence = sentence
        self.attempted = attempted
        self.right = right

    def __repr__(self) -> str:
        return self.sentence


class NotAttempted(Exception):
    """The reader's answer is still the stub."""


def exercise(
    number: int, praise: str
) -> Callable[[Callable[[Any, random.Random], Iterator[str]]], Callable[..., Verdict]]:
    """Make a check out of a generator of complaints. `praise` is said when there is none."""

    def decorate(complaints: Callable[[Any, random.Random], Iterator[str]]) -> Callable[..., Verdict]:
        @wraps(complaints)
        def check(answer: Any, seed: int = 0) -> Verdict:
            try:
                complaint = next(complaints(answer, random.Random(seed)), None)
            except NotAttempted:
                return Verdict(f"Exercise {number}: not attempted yet.", attempted=False)
            except Exception as error:
                complaint = f"your code raised {type(error).__name__}: {error}"
            if complaint is not None:
                return Verdict(f"Exercise {number}: not yet. {complaint[0].upper()}{complaint[1:]}")
            return Verdict(f"Exercise {number}: right. {praise}", right=True)

        return check

    return decorate


def attempted(value: Any) -> Any:
    """What the reader's function returned, unless it is what an unfilled stub returns."""
    if value is None or value is ...:
        raise NotAttempted
    return value
