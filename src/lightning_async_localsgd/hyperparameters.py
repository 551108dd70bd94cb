"""Ranges of the policies' hyper-parameters, checked where they are given, with one way to say what is wrong."""

from __future__ import annotations

import math
from typing import TypeGuard


def positive(owner: str, option: str, value: object, advice: str) -> float:
    """``value`` as a float, if it is a finite number > 0.

    Args:
        owner: class that the option belongs to.
        option: its name.
        value: what was given.
        advice: what to give instead; ends the error's text.

    Raises:
        ValueError: it is not.

    """
    if not (is_number(value) and 0.0 < value < math.inf):
        raise ValueError(f"{owner}: {option} must be a number > 0, got {value!r}; {advice}")
    return float(value)


def not_negative(owner: str, option: str, value: object, advice: str) -> float:
    """``value`` as a float, if it is a finite number >= 0; arguments as of :func:`positive`.

    Raises:
        ValueError: it is not.

    """
    if not (is_number(value) and 0.0 <= value < math.inf):
        raise ValueError(f"{owner}: {option} must be a number >= 0, got {value!r}; {advice}")
    return float(value)


def fraction(owner: str, option: str, value: object, advice: str) -> float:
    """``value`` as a float, if it is a number in [0, 1); arguments as of :func:`positive`.

    Raises:
        ValueError: it is not.

    """
    if not (is_number(value) and 0.0 <= value < 1.0):
        raise ValueError(f"{owner}: {option} must be in [0, 1), got {value!r}; {advice}")
    return float(value)


def count(owner: str, option: str, value: object, advice: str, least: int = 1) -> int:
    """``value``, if it is an integer >= ``least``; the other arguments as of :func:`positive`.

    Raises:
        ValueError: it is not.

    """
    if type(value) is not int or value < least:
        raise ValueError(f"{owner}: {option} must be an integer >= {least}, got {value!r}; {advice}")
    return value


def seconds(option: str, value: object) -> float:
    """``value`` as a float, if it is a finite number of seconds > 0.

    Raises:
        ValueError: it is not.

    """
    if not (is_number(value) and 0.0 < value < math.inf):
        raise ValueError(f"{option}={value!r} must be a positive number of seconds")
    return float(value)


def switch(option: str, value: object) -> bool:
    """``value``, if it is True or False.

    Raises:
        ValueError: it is not.

    """
    if not isinstance(value, bool):
        raise ValueError(f"{option}={value!r} must be True or False")
    return value


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is an int or a float, and neither a bool nor not-a-number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
