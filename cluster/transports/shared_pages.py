"""Pages that another process reads where they lie: GPUs of one host, by CUDA IPC.

The owner of a pool passes on how to map it (`SharedPool`), and then only announces which pages hold
what (`AnnouncedRun`). The other side maps the pool and copies pages from GPU to GPU by itself
(`SharedPageReader`); no byte goes over the host. `announced` says who may touch what, and when.

A mapping keeps memory alive on the device after its owner has died. So it lasts no longer than
the requests that come through it, and a dead owner's memory is there for the next.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
from ...engine.kv.pages import PageMemory, Pages, page_index
from ...engine.memory.out_of_memory import out_of_memory_raises
from .announced import AnnouncedRun

Handle = tuple[Callable[..., Tensor], tuple[Any, ...]]
"""A function and arguments that make a tensor over the same memory, in any process of the host."""


@dataclass(frozen=True)
class SharedPool:
    """How to map a pool's memory. Small, and made to be pickled; valid while its owner lives.

    `name` is unlike that of any other pool, and `host` is where its memory is. `memory` and
    `scales` are of the pool's slabs.
    """

    name: str
    host: str
    memory: tuple[Handle, ...]
    scales: tuple[Handle, ...]

    @classmethod
    def of(cls, pool: PageMemory, host: str) -> "SharedPool":
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
            memory, scales = (
                tuple(map(reduce_tensor, slabs)) for slabs in (pool.slabs, pool.scale_slabs)
            )
            return cls(uuid.uuid4().hex, host, memory, scales)
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
            memory, scales = _layers_of(self.memory), _layers_of(self.scales)
        except (RuntimeError, OSError) as error:
            raise CannotMapPagesError(in_one_line(error)) from error
        every = scales or [None] * len(memory)
        return [Pages(values, own) for values, own in zip(memory, every, strict=True)]


class SharedPageReader:
    """Copies pages out of other processes' pools. All calls come from one thread.

    Args:
        host: as in `SharedPool.of`, of this process.
        device: that pages go to.
        stream: there, on which copies run; None on a CPU.
        put: puts pages of a request in their place, as `RequestPages.receive`.
    """

    def __init__(
        self,
        host: str,
        device: torch.device,
        stream: torch.cuda.Stream | None,
        put: Callable[[str, Place, Pages], None],
    ) -> None:
        self._host = host
        self._device = device
        self._stream = stream
        self._put = put
        self._mapped: dict[str, dict[str, list[Pages]]] = {}

    def read(self, request_id: str, pool: SharedPool, runs: Sequence[AnnouncedRun]) -> int:
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
                    with out_of_memory_raises(ReceiveOutOfMemoryError(request_id)):
                        pages = self._copy(run, layers[run.place.layer])
                    self._put(request_id, run.place, pages)
                    copied += pages.nbytes
            finally:
                # Also of a run that failed: whoever hears of it gives the pages to others.
                if self._stream is not None:
                    self._stream.synchronize()
        return copied

    def _copy(self, run: AnnouncedRun, layer: Pages) -> Pages:
        heads = run.kv_heads
        chosen = layer if heads is None else layer.heads(heads.start, len(heads))
        return chosen.at(page_index(run.numbers, self._device))

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


def _layers_of(slabs: Sequence[Handle]) -> list[Tensor]:
    """Every layer of some slabs, mapped."""
    return [layer for function, arguments in slabs for layer in function(*arguments)]
