"""Checks of option values, whose errors name the option, its value and what to use instead."""

from __future__ import annotations

import math
from typing import TypeGuard


def check_positive(owner: str, option: str, value: object, advice: str) -> float:
    """Return ``value`` as a float if it is a finite number > 0.

    Args:
        owner: class that has the option.
        option: name of the option.
        value: value to check.
        advice: what to use instead, which ends the error's text.

    Raises:
        ValueError: ``value`` is anything else.

    """
    if not (is_number(value) and 0.0 < value < math.inf):
        raise ValueError(f"{owner}: {option} must be a number > 0, got {value!r}; {advice}")
    return float(value)


def check_not_negative(owner: str, option: str, value: object, advice: str) -> float:
    """Return ``value`` as a float if it is a finite number >= 0.

    The arguments are those of :func:`check_positive`.

    Raises:
        ValueError: ``value`` is anything else.

    """
    if not (is_number(value) and 0.0 <= value < math.inf):
        raise ValueError(f"{owner}: {option} must be a number >= 0, got {value!r}; {advice}")
    return float(value)


def check_fraction(owner: str, option: str, value: object, advice: str) -> float:
    """Return ``value`` as a float if it is a number in [0, 1).

    The arguments are those of :func:`check_positive`.

    Raises:
        ValueError: ``value`` is anything else.

    """
    if not (is_number(value) and 0.0 <= value < 1.0):
        raise ValueError(f"{owner}: {option} must be in [0, 1), got {value!r}; {advice}")
    return float(value)


def check_count(owner: str, option: str, value: object, advice: str, least: int = 1) -> int:
    """Return ``value`` if it is an integer >= ``least``.

    The other arguments are those of :func:`check_positive`.

    Raises:
        ValueError: ``value`` is anything else.

    """
    if type(value) is not int or value < least:
        raise ValueError(f"{owner}: {option} must be an integer >= {least}, got {value!r}; {advice}")
    return value


def check_seconds(option: str, value: object) -> float:
    """Return ``value`` as a float if it is a finite number of seconds > 0.

    Raises:
        ValueError: ``value`` is anything else.

    """
    if not (is_number(value) and 0.0 < value < math.inf):
        raise ValueError(f"{option}={value!r} must be a positive number of seconds")
    return float(value)


def check_bool(option: str, value: object) -> bool:
    """Return ``value`` if it is True or False.

    Raises:
        ValueError: ``value`` is anything else.

    """
    if not isinstance(value, bool):
        raise ValueError(f"{option}={value!r} must be True or False")
    return value


def is_number(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is an int or a float, but neither a bool nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
