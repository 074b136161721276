"""Pages by way of Ray's object store: for one machine, and for wherever nothing faster is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.exceptions import RayError

from ...engine.kv.hand_off import Destination, Place, Sender
from ...engine.kv.host_copies import HostCopies
from ...engine.kv.pages import HeldPages, Pages
from ..remedies import in_one_line
from .actor_messages import WorkerDestination, WorkerHandOff, WorkerReceiver

_MESSAGE_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class PageRun:
    """Pages on the host and where they belong, as arrays that Ray hands over without pickling.

    `values` are uint8 [n, kv_heads, 2, 128, head_dim × bytes of `dtype`].
    """

    place: Place
    dtype: torch.dtype
    values: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32] | None

    @classmethod
    def of(cls, place: Place, pages: Pages) -> "PageRun":
        """Of pages on the host; shares their memory where they lie contiguous."""
        values = pages.values.detach().contiguous()
        scales = None if pages.scales is None else pages.scales.detach().contiguous().numpy()
        return cls(place, values.dtype, values.view(torch.uint8).numpy(), scales)

    @property
    def pages(self) -> Pages:
        """What it was made of; shares the memory."""
        values = torch.from_numpy(self.values).view(self.dtype)
        return Pages(values, None if self.scales is None else torch.from_numpy(self.scales))

    def copy(self) -> "PageRun":
        """The same in memory of its own."""
        scales = None if self.scales is None else self.scales.copy()
        return PageRun(self.place, self.dtype, self.values.copy(), scales)


class ObjectStoreSender(Sender):
    """A rank's end.

    Args:
        max_in_flight_bytes: of each hand-off, whose `push` blocks rather than exceed it.
    """

    def __init__(self, max_in_flight_bytes: int) -> None:
        self._max_in_flight_bytes = max_in_flight_bytes

    def open(self, destination: Destination) -> "ObjectStoreHandOff":
        assert isinstance(destination, WorkerDestination)
        return ObjectStoreHandOff(destination, self._max_in_flight_bytes)


class ObjectStoreHandOff(WorkerHandOff):
    """Puts pages into the object store and tells a decode worker to fetch them.

    Small pushes are collected: a message costs as much as copying a megabyte.

    A push waits for copies, to the host and into the store, so a rank has a `BackgroundHandOff` in
    front, whose thread waits.
    """

    def __init__(self, destination: WorkerDestination, max_in_flight_bytes: int) -> None:
        super().__init__(destination)
        self._max_in_flight_bytes = max_in_flight_bytes
        self._host_copies = HostCopies()
        self._collected: list[PageRun] = []
        self._collected_bytes = 0

    def push(self, place: Place, pages: HeldPages) -> None:
        read = self._host_copies.bring(pages.read())
        run = PageRun.of(place, read)
        self._collected_bytes += read.nbytes
        whole = self._collected_bytes >= _MESSAGE_BYTES
        # What is sent at once is copied by being sent.
        self._collected.append(run if whole else run.copy())
        if whole:
            self._send_rest()

    def abandon(self) -> None:
        self._collected.clear()
        self._under_way.clear()

    def _send_rest(self) -> None:
        runs, size = self._collected, self._collected_bytes
        self._collected, self._collected_bytes = [], 0
        while self._under_way and sum(self._under_way.values()) + size > self._max_in_flight_bytes:
            self._wait_for_one()
        if not runs or self._failure is not None:
            return
        try:
            self._deliver(ray.put(runs), size)
        except RayError as error:
            self._fail(f"pages could not be sent: {in_one_line(error)}")


class ObjectStoreReceiver(WorkerReceiver):
    """A worker's end.

    Args:
        put: puts pages of a request in their place, as `DecodeEngine.receive`.
    """

    def __init__(self, worker: Any, put: Callable[[str, Place, Pages], None]) -> None:
        super().__init__(worker)
        self._put = put

    def receive(self, request_id: str, message: Sequence[PageRun]) -> int:
        size = 0
        for run in message:
            pages = run.pages
            self._put(request_id, run.place, pages)
            size += pages.nbytes
        return size

    def close(self, request_id: str) -> None:
        """Nothing is kept from one message to the next."""
