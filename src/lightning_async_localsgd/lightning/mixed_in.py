"""Change methods of one object, not of its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def mixed_in(instance: Any, mixin: type, **attributes: Any) -> Callable[[], None]:
    """Put the methods of ``mixin`` in front of those of the object's own class.

    The object stays an instance of its own class and keeps that class's name, for messages and for states that are
    saved by name. Its ``__dict__`` does not change, because some objects save it as their state.

    Args:
        instance: the object.
        mixin: class whose methods come first. They reach the object's own methods with ``super()``.
        attributes: class attributes for the mixin's methods to read.

    Returns:
        Function that gives the object its own class back. If several mixins are in one object, call their functions in
        reverse order. Further calls do nothing.

    """
    own = type(instance)
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    mixed = type(own.__name__, (mixin, own), {**names, **attributes})
    instance.__class__ = mixed

    def restore() -> None:
        if type(instance) is mixed:
            instance.__class__ = own

    return restore
