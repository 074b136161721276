"""Pages by CUDA IPC: the decode worker copies them out of the rank's pool, on GPUs of one host."""

from typing import Any

import ray
from ray.exceptions import RayError

from ...engine.errors import TransferError
from ...engine.kv.hand_off import PageSender, Place
from ...engine.kv.pages import HeldPages
from ...engine.kv.shared_pages import SharedPool, SharedRun
from ..remedies import in_one_line


class CudaIpcSender(PageSender):
    """Tells a decode worker which pages to copy. What is pushed must have been written.

    One message is under way at a time, and what is pushed meanwhile goes with the next: a message
    costs more than copying a layer's pages. A failure is remembered rather than raised by `push`,
    as in `ObjectStoreSender`.

    Args:
        worker: the decode worker's actor handle.
        pool: that all pages lie in.
    """

    def __init__(self, worker: Any, request_id: str, pool: SharedPool) -> None:
        self._worker = worker
        self._request_id = request_id
        self._pool = pool
        self._collected: list[SharedRun] = []
        self._under_way: ray.ObjectRef | None = None
        self._failure: str | None = None

    @property
    def failure(self) -> str | None:
        return self._failure

    def push(self, place: Place, pages: HeldPages) -> None:
        self._collected.append(SharedRun(place, pages.numbers))
        if self._is_free():
            self._send()

    def flush(self) -> None:
        # The worker answers when it has copied: then the pages may be overwritten.
        self._settle()
        self._send()
        self._settle()
        if self._failure is not None:
            raise TransferError(self._failure)

    def abandon(self) -> None:
        """Copies under way are not waited for; `engine.shared_pages` says why they do no harm."""
        self._collected.clear()
        self._under_way = None

    def _is_free(self) -> bool:
        """Whether no message is under way any more."""
        if self._under_way is not None:
            if not ray.wait([self._under_way], timeout=0)[0]:
                return False
            self._settle()
        return True

    def _send(self) -> None:
        runs, self._collected = self._collected, []
        if runs and self._failure is None:
            self._under_way = self._worker.copy.remote(self._request_id, self._pool, runs)

    def _settle(self) -> None:
        """Wait until what is under way has been copied or has failed."""
        if self._under_way is None:
            return
        try:
            ray.get(self._under_way)
        except RayError as error:
            self._failure = f"pages did not reach the decode replica: {in_one_line(error)}"
        self._under_way = None
