"""Calls between the processes of a cluster: what it means to a client when one fails."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TypeVar

from ray.exceptions import ObjectLostError, RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import RayServeException

from ..engine.errors import (
    CancelledElsewhereError,
    LongreachError,
    LostError,
    NotUpError,
    UnavailableError,
    innermost,
)

logger = logging.getLogger(__name__)

_ROUTING_SECONDS = 60

T = TypeVar("T")

CallError = (RayError, RayServeException)
"""What a call to another process may raise."""


def as_ours(error: BaseException) -> LongreachError:
    """The error that the other process raised on purpose, or that a part of the cluster failed."""
    cause = innermost(error)
    if isinstance(cause, LongreachError):
        return cause
    if isinstance(cause, (TaskCancelledError, asyncio.CancelledError)):
        # Nothing failed. Mostly its client left, which Serve saw before whoever runs it.
        return CancelledElsewhereError()
    logger.error("a part of the cluster failed", exc_info=error)
    if isinstance(cause, (RayActorError, ObjectLostError)):
        # An object is lost with the node that holds it, or with the process that asked for it.
        return LostError("a part of the cluster died; send the request again")
    if isinstance(cause, RayServeException):
        return NotUpError("a part of the cluster is not up; send the request again")
    return UnavailableError("a part of the cluster failed; its log says why")


async def first_of(stream: AsyncIterator[T]) -> T:
    """The first message of a stream, which a replica that takes a call sends at once.

    Raises:
        NotUpError: none took it for a while, and Serve's router would wait forever; or the one that
            was to take it had died.
    """
    try:
        async with asyncio.timeout(_ROUTING_SECONDS):
            return await anext(stream)
    except TimeoutError as error:
        raise NotUpError(
            f"no replica took the request within {_ROUTING_SECONDS} s; send it again"
        ) from error
    except CallError as error:
        if isinstance(innermost(error), RayActorError):
            raise NotUpError("a part of the cluster died; send the request again") from error
        raise
