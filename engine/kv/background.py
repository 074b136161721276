"""Handing pages off beside the computing: a thread and a stream of their own."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from ..errors import TransferError, in_one_line
from .hand_off import HandOff, Place
from .pages import HeldPages


class BackgroundHandOff(HandOff):
    """Pushes into another hand-off from a thread, once the device has written what is pushed.

    Whoever computes never waits, however slow the way is: pages lie in the pool until the flush,
    so what waits for its turn takes no memory. One event is recorded with every push, and the
    thread waits for it, without holding Python's lock. What is launched to send goes to another
    stream, and so does not stand in line behind the chunks that the host has launched ahead.

    Args:
        stream: of the device that the pages lie on, as `hand_off_stream` makes it; one for all
            hand-offs of a process. None where pages lie on a CPU, and are written when pushed.
    """

    def __init__(self, inner: HandOff, stream: torch.cuda.Stream | None) -> None:
        self._inner = inner
        self._stream = stream
        self._thread = ThreadPoolExecutor(1, "hand-off", _use, (stream,))
        self._abandoned = False
        self._failure: str | None = None

    @property
    def failure(self) -> str | None:
        return self._failure or self._inner.failure

    def push(self, place: Place, pages: HeldPages) -> None:
        self._thread.submit(self._push, _written(self._stream), place, pages)

    def fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> None:
        self._thread.submit(self._fetch, _written(self._stream), wanted).result()

    def flush(self) -> None:
        try:
            flushed = self._thread.submit(self._flush)
        except RuntimeError as error:
            raise TransferError("the hand-off was abandoned") from error
        flushed.result()
        if self._failure is not None:
            raise TransferError(self._failure)

    def abandon(self) -> None:
        # Does not wait: what the thread has begun ends as the transport allows.
        self._abandoned = True
        self._thread.submit(self._inner.abandon)
        self._thread.shutdown(wait=False)

    def _push(self, written: torch.cuda.Event | None, place: Place, pages: HeldPages) -> None:
        if self._abandoned or self.failure is not None:
            return
        try:
            if written is not None:
                written.synchronize()
            self._inner.push(place, pages)
        except Exception as error:
            # Nobody reads what a thread raises; a request must not be called whole after it.
            self._failure = f"pages could not be sent: {in_one_line(error)}"

    def _fetch(
        self, free: torch.cuda.Event | None, wanted: Sequence[tuple[Place, HeldPages]]
    ) -> None:
        if self._abandoned or self.failure is not None:
            return
        try:
            if free is not None:
                free.synchronize()
            self._inner.fetch(wanted)
            if self._stream is not None:
                self._stream.synchronize()
        except Exception as error:
            self._failure = f"pages could not be fetched: {in_one_line(error)}"

    def _flush(self) -> None:
        try:
            self._inner.flush()
        except TransferError:
            raise
        except Exception as error:
            # As in a push: one request ends, and not the rank with all of its gang's.
            self._failure = f"pages could not be sent: {in_one_line(error)}"


def hand_off_stream(device: torch.device) -> torch.cuda.Stream | None:
    """What a process hands its pages off on, all of them; None on a CPU.

    PyTorch keeps freed memory for the stream that took it, and does not give it to another.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _use(stream: torch.cuda.Stream | None) -> None:
    if stream is not None:
        torch.cuda.set_stream(stream)


def _written(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """Happens when what is launched so far has run; None where it has."""
    if stream is None:
        return None
    # Blocking: the thread sleeps, and takes no core from the one that launches.
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(stream.device))
    return event
