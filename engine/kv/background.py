"""Handing pages off beside the computing: a thread and a stream of their own."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..errors import LeftMeshError, TransferError, in_one_line
from ..parallel.mesh import Mesh
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
        mesh: in which pages are computed, now. Those that were not written when it was left may
            hold anything, and are not sent.
    """

    def __init__(
        self, inner: HandOff, stream: torch.cuda.Stream | None, mesh: Callable[[], Mesh]
    ) -> None:
        self._inner = inner
        self._stream = stream
        self._mesh = mesh
        self._under_way: set[_Written] = set()
        self._lock = threading.Lock()
        self._is_missing_some = False
        self._thread = ThreadPoolExecutor(1, "hand-off", _use, (stream,))
        self._abandoned = False
        self._failure: str | None = None

    @property
    def failure(self) -> str | None:
        return self._failure or self._inner.failure

    def push(self, place: Place, pages: HeldPages) -> None:
        written = _Written(_event(self._stream), self._mesh())
        with self._lock:
            self._under_way.add(written)
        self._thread.submit(self._push, written, place, pages)

    def fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> None:
        self.begin_fetch(wanted).result()

    def begin_fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> "Future[None]":
        """As `fetch`, beside whatever the caller does meanwhile; done when the pages are there.

        Until then nobody else writes these pages, and nobody abandons the hand-off.
        """
        return self._thread.submit(self._fetch, _event(self._stream), wanted)

    def flush(self) -> None:
        """As `HandOff.flush`.

        Raises:
            LeftMeshError: some was not sent, because the mesh that was to compute it was left.
        """
        try:
            flushed = self._thread.submit(self._flush)
        except RuntimeError as error:
            raise TransferError("the hand-off was abandoned") from error
        flushed.result()
        if self._failure is not None:
            raise TransferError(self._failure)
        if self._is_missing_some:
            raise LeftMeshError

    def abandon(self) -> None:
        # Does not wait: what the thread has begun ends as the transport allows.
        self._abandoned = True
        self._thread.submit(self._inner.abandon)
        self._thread.shutdown(wait=False)

    def before_leaving(self) -> None:
        """The mesh is about to be left: what is written by now is whole. On any thread."""
        with self._lock:
            for written in self._under_way:
                written.note()

    def _push(self, written: "_Written", place: Place, pages: HeldPages) -> None:
        try:
            if self._abandoned or self.failure is not None:
                return
            if written.is_whole():
                self._inner.push(place, pages)
            else:
                self._is_missing_some = True
        except Exception as error:
            # Nobody reads what a thread raises; a request must not be called whole after it.
            self._failure = f"pages could not be sent: {in_one_line(error)}"
        finally:
            with self._lock:
                self._under_way.discard(written)

    def _fetch(
        self, free: torch.cuda.Event | None, wanted: Sequence[tuple[Place, HeldPages]]
    ) -> None:
        if self.failure is not None:
            return
        try:
            if self._abandoned:
                raise TransferError("the hand-off was abandoned")
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


@dataclass(eq=False)
class _Written:
    """When pages are written that are pushed, and whether by what `mesh` computed.

    Where it is left, collectives are given up, and what was launched behind them runs all the same:
    the event happens, and what was written is anything.
    """

    event: torch.cuda.Event | None
    mesh: Mesh
    _was_in_time: bool = False

    def note(self) -> None:
        """Look whether they are written, before the mesh is left."""
        if self.event is not None and not self.mesh.is_left:
            self._was_in_time = self.event.query()

    def is_whole(self) -> bool:
        """Wait until they are written; whether that was before the mesh was left."""
        if self.event is None:
            # On a CPU they were when they were pushed, and a collective that is left raises.
            return True
        self.event.synchronize()
        # In this order: it is noted before it is left.
        return not self.mesh.is_left or self._was_in_time


def _event(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """Happens when what is launched so far has run; None where it has."""
    if stream is None:
        return None
    # Blocking: the thread sleeps, and takes no core from the one that launches.
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(stream.device))
    return event
