"""The checks behind Config and SamplingParams: what they let through, and what they say."""

from dataclasses import dataclass

import numpy as np
import pytest

from nanovllm.utils.checks import check_bool, check_choice, check_float, check_int, check_str, refuses_unknown_settings


def test_good_values_come_back_as_plain_python() -> None:
    assert (check_int("n", np.int32(3)), check_float("x", 2), check_float("x", np.float32(0.5))) == (3, 2.0, 0.5)
    assert type(check_int("n", np.int32(3))) is int and type(check_float("x", 2)) is float
    assert (check_bool("b", False), check_str("s", "a"), check_choice("c", "a", ["a", "b"])) == (False, "a", "a")
    assert (check_int("n", 5, at_least=5, at_most=5), check_float("x", 1, at_most=1, open_below=True)) == (5, 1.0)


@pytest.mark.parametrize("value", [1.0, "1", None, True, np.bool_(True), [1]])
def test_what_is_no_integer(value: object) -> None:
    with pytest.raises(TypeError, match="^n must be an integer, not"):
        check_int("n", value)


@pytest.mark.parametrize("value", ["1", None, True, np.bool_(True), 1j, [1.0]])
def test_what_is_no_number(value: object) -> None:
    with pytest.raises(TypeError, match="^x must be a number, not"):
        check_float("x", value)


def test_limits_are_told() -> None:
    with pytest.raises(ValueError, match="^n must be at least 2, not 1; try more$"):
        check_int("n", 1, at_least=2, hint="try more")
    with pytest.raises(ValueError, match="^n must be at most 8, not 9$"):
        check_int("n", 9, at_most=8)
    with pytest.raises(ValueError, match="^x must be at least 0 and finite, not 10+[.]{3}0+$"):
        check_float("x", 10**400)


def test_choices_are_told() -> None:
    with pytest.raises(ValueError, match="^dtype must be one of 'auto', 'float32', not 'fp32'$"):
        check_choice("dtype", "fp32", ["auto", "float32"])
    with pytest.raises(TypeError, match=r"^dtype must be one of 'auto', 'float32', not 32 \(int\)$"):
        check_choice("dtype", 32, ["auto", "float32"])


def test_a_long_value_does_not_make_a_long_message() -> None:
    with pytest.raises(TypeError) as caught:
        check_int("n", list(range(100_000)))
    assert len(str(caught.value)) < 100


def test_a_dataclass_refuses_unknown_settings() -> None:
    @refuses_unknown_settings
    @dataclass(slots=True)
    class Oven:
        temperature: int = 180
        minutes: int = 30

    assert (Oven(200, minutes=5).temperature, Oven(200, minutes=5).minutes) == (200, 5)
    with pytest.raises(TypeError, match="^Oven: unknown setting 'minuts'; did you mean 'minutes'[?]$"):
        Oven(minuts=5)
    with pytest.raises(TypeError, match="^Oven: unknown setting 'x'; the settings are temperature, minutes$"):
        Oven(x=5)
