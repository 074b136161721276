"""Pages that another process reads where they lie: GPUs of one host, by CUDA IPC.

The owner of a pool passes on how to map it (`SharedPool`), and then only says which pages hold
what (`SharedRun`). The other side maps the pool and copies pages from GPU to GPU by itself
(`SharedPageReader`); no byte goes over the host.

Who may touch what, and when:

- The owner announces pages when the kernels that write them have run (`BackgroundSender`), so a
  reader needs no event of another process.
- The owner leaves them as they are until the reader has answered, and the reader answers when its
  copies have run.
- An owner that gives a request up may overwrite its pages under a copy. What the copy brings is
  then wrong, and nobody will ever read it: it goes to pages of that same request, which never
  starts. The reader's side must only keep those pages from others until the copy has run.
- A mapping keeps memory alive on the device after its owner has died. So it lasts no longer than
  the requests that come through it, and a dead owner's memory is there for the next.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ...engine.errors import (
    CannotMapPagesError,
    CannotSharePagesError,
    OtherHostError,
    ReceiveOutOfMemoryError,
    in_one_line,
)
from ...engine.kv.hand_off import Place
from ...engine.kv.pages import PagePool, Pages, page_index
from ...engine.memory.out_of_memory import out_of_memory_raises

Handle = tuple[Callable[..., Tensor], tuple[Any, ...]]
"""A function and arguments that make a tensor over the same memory, in any process of the host."""


@dataclass(frozen=True)
class SharedRun:
    """Which pages of a shared pool hold what; `numbers` are theirs in that pool, int64 [n]."""

    place: Place
    numbers: npt.NDArray[np.int64]


@dataclass(frozen=True)
class SharedPool:
    """How to map a pool's memory. Small, and made to be pickled; valid while its owner lives.

    `name` is unlike that of any other pool, and `host` is where its memory is.
    """

    name: str
    host: str
    memory: Handle
    scales: Handle | None

    @classmethod
    def of(cls, pool: PagePool, host: str) -> "SharedPool":
        """Share a pool; once for each, as PyTorch counts how often and never forgets.

        Memory on a GPU must come from cudaMalloc, as PyTorch's allocator takes it by default. Its
        `expandable_segments` are shared by file descriptors, for which the reader needs the right
        to trace the owner.

        Args:
            host: equal for two processes exactly if one can map the other's memory. A handle says
                nothing about its host, and may by chance fit into another one.

        Raises:
            CannotSharePagesError: it was allocated in a way that cannot be shared.
        """
        try:
            scales = None if pool.scales is None else reduce_tensor(pool.scales)
            return cls(uuid.uuid4().hex, host, reduce_tensor(pool.memory), scales)
        except RuntimeError as error:
            raise CannotSharePagesError(in_one_line(error)) from error

    def open(self, host: str) -> list[Pages]:
        """Map it: all pages of each layer, over the owner's memory.

        Raises:
            OtherHostError: the memory is on another host.
            CannotMapPagesError: it cannot be mapped.
        """
        if host != self.host:
            raise OtherHostError(self.host, host)
        try:
            memory = _mapped(self.memory)
            scales = None if self.scales is None else _mapped(self.scales)
        except (RuntimeError, OSError) as error:
            raise CannotMapPagesError(in_one_line(error)) from error
        every = [None] * len(memory) if scales is None else list(scales)
        return [Pages(values, own) for values, own in zip(memory, every, strict=True)]


class SharedPageReader:
    """Copies pages out of other processes' pools. All calls come from one thread.

    Args:
        host: as in `SharedPool.of`, of this process.
        device: that pages go to; copies run on a stream of their own there.
        receive: puts pages of a request in their place, as `DecodeEngine.receive`.
    """

    def __init__(
        self,
        host: str,
        device: torch.device,
        receive: Callable[[str, Place, Pages], None],
    ) -> None:
        self._host = host
        self._device = device
        self._receive = receive
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._mapped: dict[str, dict[str, list[Pages]]] = {}

    def read(self, request_id: str, pool: SharedPool, runs: Sequence[SharedRun]) -> int:
        """Copy pages of one request; returns their bytes when all copies have run.

        So whoever hears of the return may let pages be overwritten there, and be read here on any
        stream.

        Raises:
            TransferError: as `SharedPool.open`, or as `receive`.
            ReceiveOutOfMemoryError: the device has no memory left for pages on their way.
        """
        with torch.cuda.stream(self._stream):
            layers = self._layers(request_id, pool)
            copied = 0
            try:
                for run in runs:
                    index = page_index(run.numbers, self._device)
                    with out_of_memory_raises(ReceiveOutOfMemoryError(request_id)):
                        pages = layers[run.place.layer].at(index)
                    self._receive(request_id, run.place, pages)
                    copied += pages.nbytes
            finally:
                # Also of a run that failed: whoever hears of it gives the pages to others.
                if self._stream is not None:
                    self._stream.synchronize()
        return copied

    def close(self, request_id: str) -> None:
        """No more pages of a request come; unknown ones are no error.

        After what was called before: its copies have run when this returns.
        """
        # Unmapping waits for the current stream, and the default one is busy with steps.
        with torch.cuda.stream(self._stream):
            self._mapped.pop(request_id, None)

    def _layers(self, request_id: str, pool: SharedPool) -> list[Pages]:
        mapped = self._mapped.setdefault(request_id, {})
        if pool.name not in mapped:
            # PyTorch maps memory once, however many requests come through it at a time.
            mapped[pool.name] = pool.open(self._host)
            if self._stream is not None:
                # The pages may have been someone else's: what was launched for them runs first.
                self._stream.wait_stream(torch.cuda.default_stream(self._device))
        return mapped[pool.name]


def _mapped(handle: Handle) -> Tensor:
    function, arguments = handle
    return function(*arguments)
