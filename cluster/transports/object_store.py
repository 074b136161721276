"""Pages by way of Ray's object store: for one machine, and for wherever nothing faster is."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.exceptions import RayError

from ...engine.errors import ReceiveOutOfMemoryError
from ...engine.kv.destination import Destination
from ...engine.kv.hand_off import Place, RequestPages, Sender
from ...engine.kv.host_copies import HostCopies
from ...engine.kv.pages import HeldPages, Pages
from ...engine.memory.out_of_memory import out_of_memory_raises
from ..messages import WorkerDestination
from ..remedies import in_one_line
from .actor_messages import WantedPages, WorkerHandOff, WorkerReceiver

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
        # What comes out of the object store is read-only, and is only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

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

    def fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> None:
        for some in self._in_messages(wanted):
            runs = self._ask_back([WantedPages.of(place, pages) for place, pages in some])
            if runs is None:
                return
            for (_, pages), run in zip(some, runs, strict=True):
                pages.write(run.pages)

    def _in_messages(
        self, wanted: Sequence[tuple[Place, HeldPages]]
    ) -> Iterator[list[tuple[Place, HeldPages]]]:
        """In their order, as many at a time as may be under way, or one."""
        some: list[tuple[Place, HeldPages]] = []
        size = 0
        for place, pages in wanted:
            if some and size + pages.nbytes > self._max_in_flight_bytes:
                yield some
                some, size = [], 0
            some.append((place, pages))
            size += pages.nbytes
        if some:
            yield some

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
        pages: of the worker's engine.
    """

    def __init__(self, worker: Any, pages: RequestPages) -> None:
        super().__init__(worker)
        self._pages = pages
        self._host_copies = HostCopies()

    def receive(self, request_id: str, message: Sequence[PageRun]) -> int:
        size = 0
        for run in message:
            pages = run.pages
            self._pages.receive(request_id, run.place, pages)
            size += pages.nbytes
        return size

    def send_back(self, request_id: str, message: Sequence[WantedPages]) -> list[PageRun]:
        with out_of_memory_raises(ReceiveOutOfMemoryError(request_id)):
            return [self._read(request_id, wanted) for wanted in message]

    def _read(self, request_id: str, wanted: WantedPages) -> PageRun:
        held = self._pages.held(request_id, wanted.place, wanted.num_pages, wanted.num_kv_heads)
        run = PageRun.of(wanted.place, self._host_copies.bring(held.read()))
        # What lies in the pool, or in the buffer of the next, is not what is sent later.
        return run.copy()

    def close(self, request_id: str) -> None:
        """Nothing is kept from one message to the next."""
