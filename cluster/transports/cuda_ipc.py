"""Pages by CUDA IPC: the decode worker copies them out of the rank's pool, on GPUs of one host."""

from collections.abc import Callable
from typing import Any

import ray
import torch

from ...engine.kv.hand_off import Destination, Place, Sender
from ...engine.kv.pages import HeldPages, Pages
from .actor_messages import WorkerDestination, WorkerHandOff, WorkerReceiver
from .shared_pages import SharedPageReader, SharedPool, SharedRun

CudaIpcMessage = tuple[SharedPool, list[SharedRun]]
"""Which pages of which pool hold what."""


class CudaIpcSender(Sender):
    """A rank's end.

    Args:
        pool: that all pages lie in.
    """

    def __init__(self, pool: SharedPool) -> None:
        self._pool = pool

    def open(self, destination: Destination) -> "CudaIpcHandOff":
        assert isinstance(destination, WorkerDestination)
        return CudaIpcHandOff(destination, self._pool)


class CudaIpcHandOff(WorkerHandOff):
    """Tells a decode worker which pages to copy. What is pushed must have been written.

    One message is under way at a time, and what is pushed meanwhile goes with the next: a message
    costs more than copying a layer's pages. The worker answers when it has copied: until then the
    pages may not be overwritten.
    """

    def __init__(self, destination: WorkerDestination, pool: SharedPool) -> None:
        super().__init__(destination)
        self._pool = pool
        self._collected: list[SharedRun] = []

    def push(self, place: Place, pages: HeldPages) -> None:
        self._collected.append(SharedRun(place, pages.numbers))
        if self._under_way:
            self._note(ray.wait(list(self._under_way), timeout=0)[0])
        if not self._under_way:
            self._send()

    def abandon(self) -> None:
        """Copies under way are not waited for; `shared_pages` says why they do no harm."""
        self._collected.clear()
        self._under_way.clear()

    def _send_rest(self) -> None:
        while self._under_way:
            self._wait_for_one()
        self._send()

    def _send(self) -> None:
        runs, self._collected = self._collected, []
        if runs:
            self._deliver((self._pool, runs), 0)


class CudaIpcReceiver(WorkerReceiver):
    """A worker's end.

    Args:
        host: as in `SharedPool.of`, of this process.
        device: that pages go to.
        put: puts pages of a request in their place, as `DecodeEngine.receive`.
    """

    def __init__(
        self,
        worker: Any,
        host: str,
        device: torch.device,
        put: Callable[[str, Place, Pages], None],
    ) -> None:
        super().__init__(worker)
        self._reader = SharedPageReader(host, device, put)

    def receive(self, request_id: str, message: CudaIpcMessage) -> int:
        pool, runs = message
        return self._reader.read(request_id, pool, runs)

    def close(self, request_id: str) -> None:
        self._reader.close(request_id)
