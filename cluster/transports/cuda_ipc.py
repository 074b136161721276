"""Pages by CUDA IPC: who wants them copies them out of the other's pool, on GPUs of one host."""

from collections.abc import Sequence
from typing import Any

import torch

from ...engine.kv.background import hand_off_stream
from ...engine.kv.destination import Destination
from ...engine.kv.hand_off import Place, RequestPages, Sender
from ...engine.kv.pages import HeldPages, Pages
from ..messages import WorkerDestination
from .announced import AnnouncedReceiver, AnnouncedRun, Announcement, AnnouncingHandOff
from .shared_pages import SharedPageReader, SharedPool


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


class CudaIpcHandOff(AnnouncingHandOff):
    """From a rank's pool, and back from the worker's."""

    def _read_back(self, pool: SharedPool, runs: Sequence[tuple[AnnouncedRun, HeldPages]]) -> None:
        into = {run.place: held for run, held in runs}
        device = runs[0][1].layer.values.device
        # Whoever calls is on the stream that hands pages off.
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def put(request_id: str, place: Place, pages: Pages) -> None:
            into[place].write(pages)

        name = self._destination.request_id
        reader = SharedPageReader(self._pool.host, device, stream, put)
        reader.read(name, pool, [run for run, _ in runs])
        reader.close(name)


class CudaIpcReceiver(AnnouncedReceiver):
    """A worker's end.

    Args:
        host: as in `SharedPool.of`, of this process.
        pages: of the worker's engine.

    Raises:
        CannotSharePagesError: they cannot be shared.
    """

    def __init__(self, worker: Any, host: str, pages: RequestPages) -> None:
        super().__init__(worker, SharedPool.of(pages.pool, host), pages)
        device = pages.pool.device
        self._reader = SharedPageReader(host, device, hand_off_stream(device), pages.receive)

    def receive(self, request_id: str, message: Announcement) -> int:
        pool, runs = message
        return self._reader.read(request_id, pool, runs)

    def close(self, request_id: str) -> None:
        self._reader.close(request_id)
