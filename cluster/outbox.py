"""Calls to other processes that must arrive, whatever becomes of the request they are made for.

Ray Serve cancels a request's task when its client leaves and, with it, every actor call that the
task has submitted and that has not been sent yet. An actor that takes its calls in order then waits
for the missing one, and all others wait behind it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

from ray.exceptions import RayError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def detached(work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
    """Run a coroutine as nobody's: what it submits to Ray belongs to no request.

    Ray finds whose call it is by a context variable, and this task has none.
    """
    return asyncio.get_running_loop().create_task(work, context=Context())


class Outbox:
    """Sends calls one after the other, from a task of its own."""

    def __init__(self) -> None:
        self._calls: asyncio.Queue[Callable[[], object]] = asyncio.Queue()
        self._task = detached(self._run())

    def send(self, call: Callable[[], object]) -> None:
        """Make a call soon; nobody waits for its answer, and its failure is logged alone."""
        self._calls.put_nowait(call)

    async def _run(self) -> None:
        while True:
            call = await self._calls.get()
            try:
                call()
            except (RayError, ValueError) as error:
                # Whoever cannot be reached any more holds nothing any more.
                logger.info("a call was not sent: %s", error)
