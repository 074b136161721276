"""Errors as they leave a process that computes: whoever reads one loads nothing for it.

Ray hands an error on as the object that was raised, and reading an object imports what it is made
of. PyTorch's errors would have replicas and ingresses import torch, which stops their event loops
for seconds, just when something has gone wrong.
"""

import functools
import inspect
import io
import pickle
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from ray.cloudpickle.cloudpickle import CloudPickler

from ..engine.errors import in_one_line

_EVERYWHERE = sys.stdlib_module_names | {"numpy", "ray"}
"""Packages that every process of a cluster has."""

T = TypeVar("T", bound=type)


def passes_on_plain_errors(actor: T) -> T:
    """Of an actor's class: what its constructor and its methods raise, any process can read.

    What is not an error of ours, Python's or Ray's is passed on as RuntimeError, with its type and
    its words. Ray's log has the whole of it.
    """
    for name, member in vars(actor).items():
        if inspect.isfunction(member) and (name == "__init__" or not name.startswith("_")):
            setattr(actor, name, _passing_on(member))
    return actor


def _passing_on(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same kind of function, as Ray looks at what kind it is."""
    if inspect.isasyncgenfunction(method):

        @functools.wraps(method)
        async def generating(*arguments: Any, **named: Any) -> AsyncGenerator[Any, None]:
            with _plain_errors():
                async with aclosing(method(*arguments, **named)) as values:
                    async for value in values:
                        yield value

        return generating
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def waiting(*arguments: Any, **named: Any) -> Any:
            with _plain_errors():
                return await method(*arguments, **named)

        return waiting

    @functools.wraps(method)
    def calling(*arguments: Any, **named: Any) -> Any:
        with _plain_errors():
            return method(*arguments, **named)

    return calling


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if _is_plain(error):
            raise
        raise RuntimeError(f"{type(error).__name__}: {in_one_line(error)}") from error


def _is_plain(error: Exception) -> bool:
    """Whether any process can read what Ray would send."""
    sent = io.BytesIO()
    try:
        _PlainPickler(sent).dump(error)
        pickle.loads(sent.getvalue())
    except Exception:
        # It cannot be sent, or cannot be read, whatever the reason.
        return False
    return True


class _NotPlainError(Exception):
    """A package would be imported by whoever reads this."""


class _PlainPickler(CloudPickler):
    """Pickles as Ray does, but no object that is made of what a process may not have."""

    def reducer_override(self, obj: Any) -> Any:
        named = obj.__name__ if inspect.ismodule(obj) else getattr(obj, "__module__", None)
        for module in (named, type(obj).__module__):
            if isinstance(module, str) and not _is_everywhere(module):
                raise _NotPlainError(module)
        return super().reducer_override(obj)


def _is_everywhere(module: str) -> bool:
    """Errors of ours stand in modules that load nothing."""
    root, _, rest = module.partition(".")
    return root in _EVERYWHERE or (root == "longreach" and rest.split(".")[-1] == "errors")
