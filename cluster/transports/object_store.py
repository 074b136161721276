"""Pages by way of Ray's object store: for one machine, and for wherever nothing faster is."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.exceptions import RayError

from ...engine.errors import TransferError
from ...engine.kv.hand_off import PageSender, Place
from ...engine.kv.host_copies import HostCopies
from ...engine.kv.pages import HeldPages, Pages
from ..remedies import in_one_line

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


class ObjectStoreSender(PageSender):
    """Puts pages into the object store and tells a decode worker to fetch them.

    Small pushes are collected: a message costs as much as copying a megabyte. A failure is
    remembered rather than raised by `push`: a rank that left a chunk half-way would leave the
    other ranks waiting for it.

    A push waits for copies, to the host and into the store. A GPU's rank has a `BackgroundSender`
    in front, whose thread waits and whose stream they run on.

    Args:
        worker: the decode worker's actor handle.
        max_in_flight_bytes: `push` blocks rather than exceed it.
    """

    def __init__(self, worker: Any, request_id: str, max_in_flight_bytes: int) -> None:
        self._worker = worker
        self._request_id = request_id
        self._max_in_flight_bytes = max_in_flight_bytes
        self._host_copies = HostCopies()
        self._collected: list[PageRun] = []
        self._collected_bytes = 0
        self._in_flight: dict[ray.ObjectRef, int] = {}
        self._failure: str | None = None

    @property
    def failure(self) -> str | None:
        """Why the hand-off failed, if it did and it is known yet."""
        return self._failure

    def push(self, place: Place, pages: HeldPages) -> None:
        read = self._host_copies.bring(pages.read())
        run = PageRun.of(place, read)
        self._collected_bytes += read.nbytes
        whole = self._collected_bytes >= _MESSAGE_BYTES
        # What is sent at once is copied by being sent.
        self._collected.append(run if whole else run.copy())
        if whole:
            self._send()

    def flush(self) -> None:
        self._send()
        self._settle(len(self._in_flight))
        if self._failure is not None:
            raise TransferError(self._failure)

    def abandon(self) -> None:
        self._collected.clear()
        self._in_flight.clear()

    def _send(self) -> None:
        runs, size = self._collected, self._collected_bytes
        self._collected, self._collected_bytes = [], 0
        while self._in_flight and sum(self._in_flight.values()) + size > self._max_in_flight_bytes:
            self._settle(1)
        if runs and self._failure is None:
            try:
                received = self._worker.receive.remote(self._request_id, ray.put(runs))
            except RayError as error:
                self._failure = f"pages could not be sent: {in_one_line(error)}"
            else:
                self._in_flight[received] = size

    def _settle(self, count: int) -> None:
        """Wait until `count` of what is under way has arrived or failed."""
        if not count:
            return
        arrived, _ = ray.wait(list(self._in_flight), num_returns=count)
        for reference in arrived:
            del self._in_flight[reference]
            try:
                ray.get(reference)
            except RayError as error:
                self._failure = f"pages did not reach the decode replica: {in_one_line(error)}"
