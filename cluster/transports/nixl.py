"""Pages by NIXL: who wants them reads them out of the other's pool, on any host.

As with CUDA IPC (`announced`), but a pool's memory is registered with NIXL's agent in its process,
and another agent reads it: by RDMA, NVLink, shared memory or TCP, as UCX finds them.

Nobody writes into another process's pages, so a late write into pages that have been given to
somebody else would have to be a read of one's own that is still under way. Hence:

- A read is waited for until it has ended, however long that takes. There is no way to end it early:
  NIXL gives a read up on its own side, and what the peer sends later is written all the same.
- The death of a peer ends a read within seconds, with an error. A peer that hangs holds up its own
  reads, and the pages that they go to, until somebody kills it, and nothing else.
"""

import importlib
import itertools
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...engine.errors import (
    CannotReachPagesError,
    NoNixlError,
    PageFormatError,
    TransferError,
    in_one_line,
)
from ...engine.kv.destination import Destination
from ...engine.kv.formats import dtype_name
from ...engine.kv.hand_off import RequestPages, Sender
from ...engine.kv.pages import HeldPages, PageMemory
from ..messages import WorkerDestination
from .announced import AnnouncedReceiver, AnnouncedRun, Announcement, AnnouncingHandOff

_MODULES = ("nixl_cu12", "nixl_cu13")
_AT_ONCE_BYTES = 32 << 20
"""Of one read. Where one host's memory is copied, Python's lock is held meanwhile."""

_PROGRESS_MICROSECONDS = 100
"""How long NIXL's thread sleeps for while nothing comes."""
_SHORTEST_LOOK, _LONGEST_LOOK = 0.0001, 0.002
"""Seconds between two looks at a read."""

Addresses = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Region:
    """Where pages of a pool lie in their process's memory.

    `layers` are addresses, one for each; the others are bytes from one to the next.
    """

    layers: tuple[int, ...]
    page_bytes: int
    head_bytes: int

    @classmethod
    def of(cls, slabs: Sequence[Tensor]) -> "Region":
        """Of [layers, pages, kv_heads, ...] each."""
        page, head = (step * slabs[0].itemsize for step in slabs[0].stride()[1:3])
        return cls(tuple(layer.data_ptr() for slab in slabs for layer in slab), page, head)

    def addresses(self, layer: int, first_head: int, numbers: npt.NDArray[np.int64]) -> Addresses:
        """Of some pages' heads, from the first on."""
        start = self.layers[layer] + first_head * self.head_bytes
        return start + (numbers * self.page_bytes).astype(np.uint64)


@dataclass(frozen=True)
class NixlPool:
    """How to read a pool in another process. Small, and made to be pickled.

    `metadata` tells another agent of the one that the memory is registered with.
    """

    agent: str
    metadata: bytes
    memory_type: str
    device: int
    kept: str
    values: Region
    scales: Region | None


@dataclass(frozen=True)
class _Pieces:
    """Bytes to read: from where to where, and how many."""

    theirs: Addresses
    own: Addresses
    lengths: Addresses

    @classmethod
    def of(cls, theirs: Addresses, own: Addresses, length: int) -> "_Pieces":
        """Those of the same length; neighbours on both sides become one, up to a size."""
        size = np.uint64(length)
        most = max(_AT_ONCE_BYTES // length, 1)
        apart = (np.diff(theirs) != size) | (np.diff(own) != size)
        borders = [0, *(np.flatnonzero(apart) + 1).tolist(), len(own)]
        firsts = [
            first for start, end in itertools.pairwise(borders) for first in range(start, end, most)
        ]
        counts = np.diff([*firsts, len(own)]).astype(np.uint64)
        return cls(theirs[firsts], own[firsts], counts * size)

    @classmethod
    def joined(cls, pieces: Sequence["_Pieces"]) -> "_Pieces":
        """All of them."""
        return cls(
            np.concatenate([each.theirs for each in pieces]),
            np.concatenate([each.own for each in pieces]),
            np.concatenate([each.lengths for each in pieces]),
        )

    def some_at_a_time(self) -> Iterator[slice]:
        """In their order, about so many as are read at once."""
        rounds = (np.cumsum(self.lengths) - 1) // np.uint64(_AT_ONCE_BYTES)
        borders = [0, *(np.flatnonzero(np.diff(rounds)) + 1).tolist(), len(self.lengths)]
        return itertools.starmap(slice, itertools.pairwise(borders))


class NixlAgent:
    """This process's agent, with which its pool is registered. On any thread.

    Raises:
        NoNixlError: NIXL is not installed.
        CannotReachPagesError: the memory cannot be registered.
    """

    def __init__(self, pool: PageMemory) -> None:
        module = _nixl()
        name = f"longreach-{uuid.uuid4().hex}"
        strict = module.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        self._lock = threading.Lock()
        self._reads: dict[str, int] = {}  # of each peer that is known: how many are under way
        self._failed: set[str] = set()
        device = pool.device
        self._type = "VRAM" if device.type == "cuda" else "DRAM"
        self._device = device.index or 0
        try:
            self._agent = module.nixl_agent(name, module.nixl_agent_config(backends=[]))
            # With another agent of NIXL's inside, whose thread sleeps between its looks at sockets:
            # that of the one which is there never does, and takes a CPU core for itself.
            config = module._bindings.nixlAgentConfig()
            config.useProgThread = True
            config.pthrDelay = _PROGRESS_MICROSECONDS
            config.syncMode = strict.value
            self._agent.agent = module._bindings.nixlAgent(name, config)
            # A peer that dies is an error then, and no silence.
            self._agent.create_backend("UCX", {"ucx_error_handling_mode": "peer"})
            for slab in (*pool.slabs, *pool.scale_slabs):
                region = (slab.data_ptr(), slab.nbytes, self._device, "")
                self._agent.register_memory([region], self._type)
            metadata = self._agent.get_agent_metadata()
        except Exception as error:
            raise CannotReachPagesError(in_one_line(error)) from error
        self.pool = NixlPool(
            name,
            metadata,
            self._type,
            self._device,
            dtype_name(pool.geometry.dtype),
            Region.of(pool.slabs),
            Region.of(pool.scale_slabs) if pool.scale_slabs else None,
        )

    def read(self, pool: NixlPool, runs: Sequence[tuple[AnnouncedRun, HeldPages]]) -> int:
        """Copy pages of another process's pool into these; returns their bytes when all are there.

        Raises:
            TransferError: the other process is gone, or has pages of another format.
        """
        pieces = _Pieces.joined([each for run, held in runs for each in _pieces(pool, run, held)])
        with self._reading(pool):
            for some in pieces.some_at_a_time():
                self._read(pool, pieces, some)
        return int(pieces.lengths.sum())

    @contextmanager
    def _reading(self, pool: NixlPool) -> Iterator[None]:
        """Know the other agent while something is read from it.

        After a failure it is forgotten, with its last read: the others would be called ended, and
        go on.
        """
        name = pool.agent
        try:
            with self._lock:
                if name in self._failed:
                    raise TransferError("its process does not answer any more")
                if name not in self._reads:
                    self._agent.add_remote_agent(pool.metadata)
                self._reads[name] = self._reads.get(name, 0) + 1
        except Exception as error:
            raise TransferError(f"pages cannot be read ({in_one_line(error)})") from error
        try:
            yield
        except Exception as error:
            self._failed.add(name)
            raise TransferError(f"pages could not be read ({in_one_line(error)})") from error
        finally:
            with self._lock:
                self._reads[name] -= 1
                if name in self._failed and not self._reads[name]:
                    del self._reads[name]
                    self._failed.remove(name)
                    self._agent.remove_remote_agent(name)

    def _read(self, pool: NixlPool, pieces: _Pieces, some: slice) -> None:
        own = self._descriptors(pieces.own, pieces.lengths, some, self._device, self._type)
        theirs = self._descriptors(
            pieces.theirs, pieces.lengths, some, pool.device, pool.memory_type
        )
        handle = self._agent.initialize_xfer("READ", own, theirs, pool.agent)
        state, look = self._agent.transfer(handle), _SHORTEST_LOOK
        while state == "PROC":
            time.sleep(look)
            look = min(2 * look, _LONGEST_LOOK)
            state = self._agent.check_xfer_state(handle)
        handle.release()
        if state != "DONE":
            raise TransferError(f"NIXL says {state}")

    def _descriptors(
        self, addresses: Addresses, lengths: Addresses, some: slice, device: int, memory_type: str
    ) -> Any:
        rows = (addresses[some], lengths[some], np.full(len(lengths[some]), device, np.uint64))
        return self._agent.get_xfer_descs(np.stack(rows, axis=1), memory_type)


class NixlSender(Sender):
    """A rank's end."""

    def __init__(self, agent: NixlAgent) -> None:
        self._agent = agent

    def open(self, destination: Destination) -> "NixlHandOff":
        assert isinstance(destination, WorkerDestination)
        return NixlHandOff(destination, self._agent)


class NixlHandOff(AnnouncingHandOff):
    """From a rank's pool, and back from the worker's."""

    def __init__(self, destination: WorkerDestination, agent: NixlAgent) -> None:
        super().__init__(destination, agent.pool)
        self._agent = agent

    def _read_back(self, pool: NixlPool, runs: Sequence[tuple[AnnouncedRun, HeldPages]]) -> None:
        self._agent.read(pool, runs)


class NixlReceiver(AnnouncedReceiver):
    """A worker's end.

    Args:
        pages: of the worker's engine.
    """

    def __init__(self, worker: Any, agent: NixlAgent, pages: RequestPages) -> None:
        super().__init__(worker, agent.pool, pages)
        self._agent = agent
        self._ready: set[str] = set()

    def source_of(self, message: Announcement) -> str:
        return message[0].agent

    def receive(self, request_id: str, message: Announcement) -> int:
        pool, runs = message
        self._wait_for_what_was_launched(request_id)
        held = [(run, self._held(request_id, pool, run)) for run in runs]
        size = self._agent.read(pool, held)
        for run, pages in held:
            self._pages.note_arrival(request_id, run.place, len(pages), pages.layer.values.shape[1])
        return size

    def _held(self, request_id: str, pool: NixlPool, run: AnnouncedRun) -> HeldPages:
        """The pages that a rank's go to: as many heads as are meant of its pages."""
        own = run.kv_heads
        heads = pool.values.page_bytes // pool.values.head_bytes if own is None else len(own)
        return self._pages.held(request_id, run.place, len(run.numbers), heads)

    def _wait_for_what_was_launched(self, request_id: str) -> None:
        """On a GPU, pages may have been somebody else's, whose last step may still write them."""
        device = self._pages.pool.device
        if device.type == "cuda" and request_id not in self._ready:
            torch.cuda.default_stream(device).synchronize()
            self._ready.add(request_id)

    def close(self, request_id: str) -> None:
        self._ready.discard(request_id)


def _pieces(pool: NixlPool, run: AnnouncedRun, held: HeldPages) -> Iterator[_Pieces]:
    """What one run has, its scales included."""
    kept = dtype_name(held.layer.values.dtype)
    if kept != pool.kept:
        raise PageFormatError(pool.kept, kept)
    first = 0 if run.kv_heads is None else run.kv_heads.start
    for own, theirs in ((held.layer.values, pool.values), (held.layer.scales, pool.scales)):
        if own is not None and theirs is not None:
            page, head = (step * own.itemsize for step in own.stride()[:2])
            places = own.data_ptr() + (held.numbers * page).astype(np.uint64)
            there = theirs.addresses(run.place.layer, first, run.numbers)
            yield _Pieces.of(there, places, own.shape[1] * head)


def _nixl() -> Any:
    """NIXL's module, of whichever CUDA version is installed; both work where there is no GPU."""
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise NoNixlError
