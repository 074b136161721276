"""What the ranks of one axis of a mesh exchange, in a way that can be left from outside.

A rank that dies in the middle of a collective leaves the others waiting in it. NCCL's are ended by
aborting the communicator from another thread. Gloo knows no abort: the connections to those that
live stay open, and whoever waits for one of them would wait for good. So a wait of gloo's looks up
now and then whether its mesh was left.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from ..errors import LeftMeshError

_LOOK = timedelta(seconds=0.2)

_abandoned: list[object] = []
"""Collectives of gloo that nobody ends, and their groups: PyTorch waits for them before it frees
one. They go with their process."""


@dataclass(frozen=True, eq=False)
class Communicator:
    """The ranks of one axis.

    `left` is set when the mesh is, by whichever thread. `on_host`, collectives have ended when they
    return, as gloo's do; else they are launched.

    Every collective raises LeftMeshError where the mesh was left.
    """

    group: dist.ProcessGroup
    left: threading.Event
    on_host: bool

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.group.size()

    def all_reduce(self, partial: Tensor) -> None:
        """Sum in place."""
        self._run(lambda waits: dist.all_reduce(partial, group=self.group, async_op=not waits))

    def all_gather(self, gathered: Tensor, part: Tensor) -> None:
        """Bring every rank's part together; both contiguous."""
        # Flat, because backends differ in which shapes they take.
        into, own = gathered.view(-1), part.view(-1)
        self._run(
            lambda waits: dist.all_gather_into_tensor(
                into, own, group=self.group, async_op=not waits
            )
        )

    def all_to_all(self, received: Tensor, parts: Tensor) -> None:
        """Send part i to rank i, and get part j from rank j; both contiguous."""
        into, own = received.view(-1), parts.view(-1)
        self._run(
            lambda waits: dist.all_to_all_single(into, own, group=self.group, async_op=not waits)
        )

    def broadcast(self, values: Tensor) -> None:
        """Give all ranks what the first has, in place."""
        self._run(
            lambda waits: dist.broadcast(values, group=self.group, group_src=0, async_op=not waits)
        )

    def _run(self, collective: Callable[[bool], dist.Work | None]) -> None:
        """Begin a collective, which is told whether to wait by itself, and see to its end."""
        if self.left.is_set():
            raise LeftMeshError
        work = collective(not self.on_host)
        if self.on_host and work is not None:
            self._wait(work)

    def _wait(self, work: dist.Work) -> None:
        while not work.is_completed():
            # Time that is up raises as a failure does, and the work may have ended since. If it
            # failed, waiting for what has ended says so again.
            with suppress(RuntimeError):
                work.wait(_LOOK)
            if self.left.is_set() and not work.is_completed():
                _abandoned.append((work, self.group))
                raise LeftMeshError
        work.wait()
