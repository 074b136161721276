"""Functions of vLLM's that do something of ours beside: where it offers no other way in."""

import inspect
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]

_OURS = "__longreach__"
"""What functions of ours have, and no others: `__wrapped__` is on whatever vLLM decorates."""


def replace_once(owner: type, name: str, make: Callable[[Function], Function]) -> None:
    """Put what `make` makes of a class's function in its place; nothing if it is there already.

    Args:
        make: gets the function as the class gives it: one of the class, not of its objects, comes
            with the class bound to it, and so does what is made of it.

    Raises:
        AttributeError: the class has no such function: vLLM's insides are others.
    """
    original = getattr(owner, name)
    if hasattr(original, _OURS):
        return
    made = make(original)
    setattr(made, _OURS, True)
    # What the class gives for itself, and not for an object, must not be bound to one.
    of_objects = inspect.isfunction(inspect.getattr_static(owner, name))
    setattr(owner, name, made if of_objects else staticmethod(made))
