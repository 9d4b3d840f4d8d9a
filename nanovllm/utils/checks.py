"""Checks of the settings that users give: a wrong one is refused at once, by name, with what would be right.

Every check returns the value as the plain Python type it stands for, so that a numpy integer is as welcome as an `int`.
A wrong kind of value is a TypeError, a value out of range a ValueError. Booleans are never numbers here: `True` where a
count belongs is a slip, not a one.
"""

import difflib
import functools
import numbers
import operator
import reprlib
import sys
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

C = TypeVar("C", bound=type)

FLOAT32_MAX = 3.4028234663852886e38  # settings become float32 on the device; what is larger would be infinite there


def check_int(name: str, value: Any, at_least: int = 0, at_most: int = sys.maxsize, hint: str = "") -> int:
    """`value` as an int between `at_least` and `at_most`, both included; `hint` ends the message of the error."""
    try:
        is_bool = type(value).__name__ in ("bool", "bool_")  # numpy's, too, which numpy 1 has an index for
        number = None if is_bool else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise _wrong_type(name, "an integer", value, hint)
    if not at_least <= number <= at_most:
        limits = f"at least {at_least}" if number < at_least else f"at most {at_most}"
        raise _wrong_value(name, limits, value, hint)
    return number


def check_float(
    name: str, value: Any, at_least: float = 0.0, at_most: float = FLOAT32_MAX, open_below: bool = False, hint: str = ""
) -> float:
    """`value` as a finite float between `at_least` and `at_most`; with `open_below`, `at_least` itself is excluded."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number:
        raise _wrong_type(name, "a number", value, hint)
    # NaN compares false with everything, so it fails here like any number out of range.
    if not at_least <= value <= at_most or (open_below and value == at_least):
        lower = f"above {at_least:g}" if open_below else f"at least {at_least:g}"
        upper = "finite" if at_most == FLOAT32_MAX else f"at most {at_most:g}"
        raise _wrong_value(name, f"{lower} and {upper}", value, hint)
    return float(value)


def check_bool(name: str, value: Any) -> bool:
    """`value`, which must be True or False."""
    if not isinstance(value, bool):
        raise _wrong_type(name, "True or False", value)
    return value


def check_str(name: str, value: Any, hint: str = "") -> str:
    """`value`, which must be a string with something in it."""
    if not isinstance(value, str):
        raise _wrong_type(name, "a string", value, hint)
    if not value:
        raise _wrong_value(name, "a string with something in it", value, hint)
    return check_text(name, value)


def check_text(name: str, value: str) -> str:
    """`value`, which must be text that UTF-8 can write; a JSON file or a page may hold half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half a character, {value[error.start]!r}, at {error.start}") from None
    return value


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """`value`, which must be one of `choices`."""
    choices = list(choices)
    expected = "one of " + ", ".join(map(repr, choices))
    if not isinstance(value, str):
        raise _wrong_type(name, expected, value)
    if value not in choices:
        raise _wrong_value(name, expected, value)
    return value


def unknown_setting_error(owner: str, name: str, valid: Iterable[str]) -> TypeError:
    """The error for a keyword that `owner` does not have: it names the nearest valid one, or all if none is near."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(valid)}"
    return TypeError(f"{owner}: unknown setting {name!r}; {advice}")


def refuses_unknown_settings(cls: C) -> C:
    """Make a dataclass answer an unknown keyword with `unknown_setting_error`. Goes above `@dataclass`."""
    init = cls.__init__  # type: ignore[misc]
    valid = [field.name for field in fields(cls) if field.init]

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in valid:
                raise unknown_setting_error(cls.__name__, name, valid)
        init(self, *args, **settings)

    cls.__init__ = checked_init  # type: ignore[misc]
    return cls


def _wrong_type(name: str, expected: str, value: Any, hint: str = "") -> TypeError:
    return TypeError(f"{name} must be {expected}, not {_short(value)} ({type(value).__name__}){_tail(hint)}")


def _wrong_value(name: str, expected: str, value: Any, hint: str = "") -> ValueError:
    return ValueError(f"{name} must be {expected}, not {_short(value)}{_tail(hint)}")


def _short(value: Any) -> str:
    return reprlib.repr(value)  # a list of a million tokens must not become a message of a million tokens


def _tail(hint: str) -> str:
    return f"; {hint}" if hint else ""
