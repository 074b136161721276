"""Streams between replicas: whoever listens knows within seconds that the other side hangs.

A replica says something every few seconds, if only that it is there; whoever hears nothing for
longer gives it up. Serve's own checks find a replica that hangs after half a minute.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import TypeVar

from ..engine.errors import LostError

BEAT_SECONDS = 2.0
SILENT_SECONDS = 10.0

T = TypeVar("T")
B = TypeVar("B")


async def beating(
    events: AsyncGenerator[T, None], beat: B, seconds: float = BEAT_SECONDS
) -> AsyncGenerator[T | B, None]:
    """What a generator yields, and `beat` whenever it has yielded nothing for so long."""
    waiting: asyncio.Future[T] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(events))
            await asyncio.wait({waiting}, timeout=seconds)
            if not waiting.done():
                yield beat
                continue
            came, waiting = waiting, None
            try:
                event = came.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if waiting is not None:
            waiting.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await waiting
        await events.aclose()


async def listening(
    stream: AsyncIterator[T], seconds: float = SILENT_SECONDS
) -> AsyncGenerator[T, None]:
    """What a stream of another process says.

    Raises:
        LostError: it was silent for too long.
    """
    while True:
        try:
            async with asyncio.timeout(seconds):
                message = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise LostError(
                f"a part of the cluster was silent for {seconds:g} s; send the request again"
            ) from error
        yield message
