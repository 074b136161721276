"""The bodies that a process holds: few of the largest, however many clients send."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from .encodings import Inflater
from .errors import BUSY_SECONDS, busy

_LARGEST_AT_ONCE = 4


class Bodies:
    """Counts the bytes of the bodies that are held, and refuses what would be too many."""

    def __init__(self, max_body_bytes: int) -> None:
        self._most = _LARGEST_AT_ONCE * max_body_bytes
        self.held = 0

    @asynccontextmanager
    async def of(
        self, request: Request, inflater: Inflater | None = None
    ) -> AsyncGenerator["HeldBody", None]:
        """A request's body, held until it is taken or the context is left.

        Args:
            inflater: unpacks it; as it comes without.

        Raises:
            RestError: too many bytes are held now, or the body cannot be unpacked.
            ClientDisconnect: the client left.
        """
        body = HeldBody(self)
        try:
            # Not `request.body()`, which the request would keep for as long as it is answered.
            async for data in request.stream():
                pieces = iter([data]) if inflater is None else inflater.unpack(data)
                while (piece := await _next(pieces, inflater is None)) is not None:
                    body.extend(piece)
                    if self.held > self._most:
                        raise busy(
                            f"too many large bodies are being read; try again in {BUSY_SECONDS} s"
                        )
            if inflater is not None:
                inflater.end()
            yield body
        finally:
            body.take()


async def _next(pieces: Iterator[bytes], is_there: bool) -> bytes | None:
    """The next piece, None after the last; in a thread where it has to be computed."""
    if is_there:
        return next(pieces, None)
    return await asyncio.to_thread(next, pieces, None)


class HeldBody:
    """One body, or as much of it as has come, in parts: to join a large one stops the loop."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.parts: list[bytes] = []
        self._size = 0

    def extend(self, data: bytes) -> None:
        """Hold more."""
        self.parts.append(data)
        self._size += len(data)
        self._bodies.held += len(data)

    def take(self) -> list[bytes]:
        """All parts, which are not held any more."""
        self._bodies.held -= self._size
        parts, self.parts, self._size = self.parts, [], 0
        return parts
