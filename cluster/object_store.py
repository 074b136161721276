"""Pages by way of Ray's object store: for one machine, and for wherever nothing faster is."""

from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from ..engine.errors import TransferError
from ..engine.transport import PageSender

PageRun = tuple[int, int, int, Any, Any]
"""Layer, first page, first KV head, the pages `as_bytes`, and their scales or None, as
`PageSender.push` has them."""

_MESSAGE_BYTES = 1 << 20


class ObjectStoreSender(PageSender):
    """Puts pages into the object store and tells a decode worker to fetch them.

    Small pushes are collected: a message costs as much as copying a megabyte. A failure is
    remembered rather than raised by `push`: a rank that left a chunk half-way would leave the
    other ranks waiting for it.

    Args:
        worker: the decode worker's actor handle.
        max_in_flight_bytes: `push` blocks rather than exceed it.
    """

    def __init__(self, worker: Any, request_id: str, max_in_flight_bytes: int) -> None:
        self._worker = worker
        self._request_id = request_id
        self._max_in_flight_bytes = max_in_flight_bytes
        self._collected: list[PageRun] = []
        self._collected_bytes = 0
        self._in_flight: dict[ray.ObjectRef, int] = {}
        self._failure: str | None = None

    @property
    def failure(self) -> str | None:
        """Why the hand-off failed, if it did and it is known yet."""
        return self._failure

    def push(
        self,
        layer: int,
        first_page: int,
        first_kv_head: int,
        pages: Tensor,
        scales: Tensor | None = None,
    ) -> None:
        data = as_bytes(pages)
        own = None if scales is None else scales.detach().cpu().numpy().copy()
        whole = data.nbytes >= _MESSAGE_BYTES
        # What is sent at once is copied by being sent.
        sent = data if whole else data.copy()
        self._collected.append((layer, first_page, first_kv_head, sent, own))
        self._collected_bytes += data.nbytes + (0 if own is None else own.nbytes)
        if self._collected_bytes >= _MESSAGE_BYTES:
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
                self._failure = f"pages could not be sent: {_reason(error)}"
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
                self._failure = f"pages did not reach the decode replica: {_reason(error)}"


def _reason(error: RayError) -> str:
    """One line: errors of other processes come with their stack traces."""
    return str(getattr(error, "cause", None) or str(error).splitlines()[0])


def as_bytes(pages: Tensor) -> Any:
    """Pages as an array that Ray hands over without pickling: uint8 [..., head_dim × itemsize]."""
    return pages.detach().cpu().contiguous().view(torch.uint8).numpy()


def from_bytes(data: Any, scales: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What `as_bytes` was given, and the scales that came with it; shares the memory.

    Args:
        dtype: of pages without scales; those with scales are float8_e4m3fn.
    """
    if scales is None:
        return torch.from_numpy(data).view(dtype), None
    return torch.from_numpy(data).view(torch.float8_e4m3fn), torch.from_numpy(scales)
