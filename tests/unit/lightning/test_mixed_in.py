"""Mixins in single objects."""

from __future__ import annotations

import copy
from typing import Any

from lightning_async_localsgd.lightning.mixed_in import mixed_in


class Greeter:
    def __init__(self) -> None:
        self.name = "Ada"

    def greet(self) -> str:
        return f"Hello {self.name}"


class Loud:
    _sign: str

    def greet(self) -> str:
        return super().greet().upper() + self._sign  # type: ignore[misc,no-any-return]


class Polite:
    def greet(self) -> str:
        return "Dear " + super().greet()  # type: ignore[misc,no-any-return]


def test_mixin_method_overrides_the_objects_method_and_can_call_it() -> None:
    greeter, other = Greeter(), Greeter()
    mixed_in(greeter, Loud, _sign="!")
    assert greeter.greet() == "HELLO ADA!"
    assert other.greet() == "Hello Ada"


def test_object_keeps_its_class_name_and_its_attributes() -> None:
    class Local(Greeter):
        pass

    greeter = Local()
    before = dict(vars(greeter))
    mixed_in(greeter, Loud, _sign="!")
    assert isinstance(greeter, Local)
    for attribute in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(greeter), attribute) == getattr(Local, attribute)
    assert vars(greeter) == before
    assert copy.copy(greeter).greet() == "HELLO ADA!"


def test_restore_sets_the_original_class_and_may_be_called_again() -> None:
    greeter = Greeter()
    restore = mixed_in(greeter, Loud, _sign="!")
    restore()
    assert type(greeter) is Greeter
    assert greeter.greet() == "Hello Ada"
    assert not hasattr(greeter, "_sign")
    second = mixed_in(greeter, Polite)
    restore()
    assert greeter.greet() == "Dear Hello Ada"
    second()
    assert type(greeter) is Greeter


def test_mixins_nest_and_are_restored_in_reverse_order() -> None:
    greeter: Any = Greeter()
    first = mixed_in(greeter, Loud, _sign="!")
    between = type(greeter)
    second = mixed_in(greeter, Polite)
    assert greeter.greet() == "Dear HELLO ADA!"
    second()
    assert type(greeter) is between
    assert greeter.greet() == "HELLO ADA!"
    first()
    assert type(greeter) is Greeter
