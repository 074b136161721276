"""Work of a process's own, which no request's end may take along.

Ray Serve cancels a request's task when its client leaves and, with it, every actor call that the
task has submitted and that has not been sent yet. An actor that takes its calls in order then waits
for the missing one, and all others wait behind it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, ParamSpec, TypeVar

from ray.exceptions import RayError

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")


def as_nobody(call: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """Make a call whose submissions to Ray belong to no request.

    Ray finds whose call it is by a context variable, and there is none here.
    """
    return Context().run(call, *given, **named)


def tell(call: Callable[P, object], *given: P.args, **named: P.kwargs) -> None:
    """Make a call that must arrive, as nobody; nobody waits for its answer."""
    try:
        as_nobody(call, *given, **named)
    except RayError as error:
        # Whoever cannot be reached any more holds nothing any more.
        logger.info("a call was not sent: %s", error)


def detached(work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
    """Run a coroutine as nobody's task; see `as_nobody`. Whoever calls keeps the task."""
    return asyncio.get_running_loop().create_task(work, context=Context())


def forever(
    work: Coroutine[Any, Any, None], on_failure: Callable[[BaseException], None]
) -> "asyncio.Task[None]":
    """Run what must not end: its end is a failure, a cancellation that nobody asked for too."""

    def ended(task: "asyncio.Task[None]") -> None:
        if task.cancelled():
            on_failure(asyncio.CancelledError("a task that must not end was cancelled"))
        else:
            on_failure(task.exception() or RuntimeError("a task that must not end has ended"))

    task = detached(work)
    task.add_done_callback(ended)
    return task
