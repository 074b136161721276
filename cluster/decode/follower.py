"""The process of a decode worker's further ranks, as an asynchronous Ray actor.

It decides nothing. The leader's orders come by a socket, and are carried out on a thread of their
own; prefill ranks send pages here as they do to the worker.
"""

import asyncio
import logging
import uuid
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...engine.errors import LostError, TransferError, UnavailableError
from .. import metrics
from ..metrics import Metrics, ProcessFigures
from ..nodes import metrics_of_node, reading_here
from ..plain_errors import passes_on_plain_errors
from ..pulse import Pulse, Reading
from ..settings import WorkerSettings
from .fences import check_epoch, unless_broken
from .meeting import WorkerMeeting

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

    from ...engine.decode.follower import FollowerPages, FollowingRank

logger = logging.getLogger(__name__)

_ENDED_REMEMBERED = 4096


@passes_on_plain_errors
class DecodeFollower:
    """One rank's shard and its pages. `listen` comes first, then `join`, then all else.

    Args:
        rank: of the worker's mesh, 1 or more.
    """

    def __init__(self, settings: WorkerSettings, rank: int, metrics_directory: Path) -> None:
        # What comes out of the object store is read-only, and is only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._settings, self._rank = settings, rank
        self._sink = Metrics(metrics_of_node(metrics_directory), "decode", settings.model.name)
        ProcessFigures(self._sink).start()
        self._pulse = Pulse()
        self._failure: BaseException | None = None
        self._epochs: dict[str, int] = {}
        self._ended: deque[str] = deque(maxlen=_ENDED_REMEMBERED)
        self._store: Store | None = None

    async def listen(self, key: bytes) -> str:
        """Let the leader connect; the address of the socket.

        It is no file, so nothing is left of it when this process dies.
        """
        address = f"\0longreach-{uuid.uuid4().hex}"
        self._channel = Listener(address, "AF_UNIX", authkey=key)
        return address

    async def open_meeting(self) -> tuple[str, int]:
        """Serve the store that all ranks meet in, which only rank 1 does; its host and port."""
        import ray
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        host = ray.util.get_node_ip_address()
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._store = store
        return host, store.port

    async def join(self, own_handle: Any, meeting: WorkerMeeting) -> None:
        """Meet the other ranks, load this rank's shard, and begin to follow.

        Args:
            own_handle: this actor's, which ranks send pages to.

        Raises:
            CheckpointError: the model cannot be read.
            ConfigurationError: it does not fit, or the transport cannot reach this rank's pages.
        """
        import ray
        import torch

        from ..transports import make_receiver
        from .copier import PageCopier

        settings = self._settings
        set_threads = partial(torch.set_num_threads, settings.decode.threads)
        self._thread = ThreadPoolExecutor(1, "step", set_threads)
        loop = asyncio.get_running_loop()
        follower, pages, orders = await loop.run_in_executor(self._thread, self._load, meeting)
        host = ray.util.get_node_ip_address()
        self._pages = pages
        self._receiver = make_receiver(settings.transport, own_handle, host, pages)
        self._copier = PageCopier(self._receiver, pages, self._pulse, set_threads)
        follow = partial(follower.follow, orders, self._pulse.piece)
        self._following = loop.run_in_executor(self._thread, follow)
        self._following.add_done_callback(self._stopped)

    def _load(self, meeting: WorkerMeeting) -> tuple["FollowingRank", "FollowerPages", Any]:
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        from .engines import make_following_rank

        store = self._store or TCPStore(*meeting.store)
        with reading_here():
            return make_following_rank(self._settings, self._rank, store, self._channel)

    def _stopped(self, following: "asyncio.Future[None]") -> None:
        """Orders have ended: with the leader's process, or because one failed here."""
        if not following.cancelled():
            self._fail(following.exception() or LostError("the leader is gone"))

    async def pulse(self) -> Reading:
        """How its work goes on; see `pulse.watch`.

        Raises:
            LostError: it follows no more.
        """
        if self._failure is not None:
            raise LostError("a rank of the decode worker failed") from self._failure
        return self._pulse.read()

    async def expect(self, request_id: str, pages: npt.NDArray[np.int64]) -> None:
        """A request's pages may come from now on; these are theirs.

        Raises:
            UnavailableError: the request was released before.
        """
        from ...kernels.pages import BlockTable

        if request_id in self._ended:
            raise UnavailableError("the request was released; send it again")
        self._epochs[request_id] = 0
        self._pages.expect(request_id, BlockTable(pages))

    async def go_on(self, request_id: str, epoch: int) -> int:
        """Refuse pages of earlier epochs; tokens whose pages have come.

        Returns when no page of a gang that was given up is being copied any more.

        Raises:
            TransferError: the request was released.
        """
        if request_id not in self._epochs:
            raise TransferError(f"request {request_id} takes no pages; it was cancelled")
        self._epochs[request_id] = epoch
        return await self._copier.complete_tokens(request_id)

    async def deliver(self, request_id: str, epoch: int, message: Any) -> None:
        """Take pages of a request, as `DecodeWorker.deliver`."""
        self._check_epoch(request_id, epoch)
        size = await unless_broken(self._copier.copy(request_id, message), self._fail)
        self._sink.add(metrics.HANDOFF_BYTES, size)

    async def send_back(self, request_id: str, epoch: int, message: Any) -> Any:
        """Let a gang that goes on have pages back, as `DecodeWorker.send_back`."""
        self._check_epoch(request_id, epoch)
        return await unless_broken(self._copier.send_back(request_id, message), self._fail)

    async def all_came(self, request_id: str) -> None:
        """All pages of a request have come; it generates from now on."""
        self._no_more(request_id)
        self._copier.close_soon(request_id)
        self._pages.forget(request_id)

    async def close(self, request_id: str) -> None:
        """Return when no copy of a request is under way any more, nor will be."""
        self._no_more(request_id)
        try:
            await self._copier.close(request_id)
        except Exception as error:
            self._fail(error)
            raise
        self._pages.forget(request_id)

    def _no_more(self, request_id: str) -> None:
        if request_id not in self._ended:
            self._ended.append(request_id)
        self._epochs.pop(request_id, None)

    def _check_epoch(self, request_id: str, epoch: int) -> None:
        check_epoch(request_id, self._epochs.get(request_id), epoch)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            logger.error("a rank of a decode worker failed", exc_info=error)
            self._failure = error
