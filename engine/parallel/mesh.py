"""The ranks that share one model: tensor parallel × sequence parallel.

Tensor ranks are neighbours: rank = sequence_rank * tensor_parallel + tensor_rank. Tensor parallel
shards heads and MLP; sequence parallel shards the rows of every prefill chunk. All communication
of the engine goes through here, so a mesh of one communicates nothing.

What is begun runs beside whatever the caller computes until it waits: see `aside`.

A mesh does not change. Ranks that lose one, or get one more, leave theirs and join another.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ..errors import ConfigurationError
from .aside import Pending, aside
from .communicator import Communicator

_COLLECTIVE_TIMEOUT = timedelta(minutes=10)

_NCCL_LEAVES_ERRORS_ALONE = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
"""PyTorch ends the process of whoever loses a peer, or waits for one, unless it is told not to."""


@dataclass(frozen=True)
class Mesh:
    """One rank's place, and those it communicates with (None where an axis has one rank)."""

    tensor_parallel: int
    sequence_parallel: int
    rank: int
    tensor: Communicator | None = None
    sequence: Communicator | None = None
    _left: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)
    _leaving: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @property
    def tensor_rank(self) -> int:
        """Which shard of heads and MLP this rank holds."""
        return self.rank % self.tensor_parallel

    @property
    def sequence_rank(self) -> int:
        """Which part of every chunk's rows this rank computes."""
        return self.rank // self.tensor_parallel

    @classmethod
    def single(cls) -> "Mesh":
        """One process that holds everything."""
        return cls(1, 1, 0)

    @classmethod
    def join(
        cls,
        tensor_parallel: int,
        sequence_parallel: int,
        rank: int,
        meeting: str | dist.Store,  # pyright: ignore[reportPrivateImportUsage]
        backend: str = "gloo",
    ) -> "Mesh":
        """Meet the other ranks; returns when all have come.

        Args:
            meeting: where all ranks find each other: the store that they share, or what is the
                same on each, "tcp://host:port" or "file:///path".
            backend: "nccl" where every rank has a GPU to itself, "gloo" elsewhere.
        """
        size = tensor_parallel * sequence_parallel
        if tensor_parallel < 1 or sequence_parallel < 1 or not 0 <= rank < size:
            raise ConfigurationError(
                f"rank {rank} does not exist in a mesh of {tensor_parallel} × {sequence_parallel}"
            )
        if size == 1:
            return cls.single()
        if backend == "nccl":
            os.environ.update(_NCCL_LEAVES_ERRORS_ALONE)
        by_name = isinstance(meeting, str)
        dist.init_process_group(
            backend,
            init_method=meeting if by_name else None,
            store=None if by_name else meeting,
            rank=rank,
            world_size=size,
            timeout=_COLLECTIVE_TIMEOUT,
        )
        tensor_groups = [
            [s * tensor_parallel + t for t in range(tensor_parallel)]
            for s in range(sequence_parallel)
        ]
        sequence_groups = [list(ranks) for ranks in zip(*tensor_groups, strict=True)]
        left, on_host = threading.Event(), backend == "gloo"
        tensor, sequence = (
            Communicator(_own_group(groups, rank), left, on_host) if len(groups[0]) > 1 else None
            for groups in (tensor_groups, sequence_groups)
        )
        return cls(tensor_parallel, sequence_parallel, rank, tensor, sequence, left)

    @property
    def is_left(self) -> bool:
        """Whether `leave` was called: what was computed since then may be anything."""
        return self._left.is_set()

    def leave(self) -> None:
        """Give up whatever is being exchanged, and exchange nothing from now on. On any thread.

        The thread that launches is freed where it waits for others, dead or alive. After this the
        process may join another mesh. One that was left stays so.
        """
        with self._leaving:
            if self._left.is_set():
                return
            self._left.set()
            if self._communicates:
                distributed_c10d._abort_process_group()

    def close(self) -> None:
        """End it when nothing is being exchanged, and the other ranks exchange nothing more."""
        self._left.set()
        if self._communicates:
            dist.destroy_process_group()

    @property
    def _communicates(self) -> bool:
        return self.tensor is not None or self.sequence is not None

    def sum_over_tensor_ranks(self, partial: Tensor) -> Tensor:
        """All-reduce in place."""
        return self.begin_sum_over_tensor_ranks(partial).wait()

    def begin_sum_over_tensor_ranks(self, partial: Tensor) -> Pending[Tensor]:
        """All-reduce in place, beside computing."""
        return _begin_sum(partial, self.tensor, "tensor")

    def gather_over_tensor_ranks(self, part: Tensor) -> Tensor:
        """All-gather tensors of one shape: [tensor_parallel, *part.shape]."""
        return _begin_gather(part, None, None, self.tensor, "tensor").wait()

    def sum_over_sequence_ranks(self, partial: Tensor) -> Tensor:
        """All-reduce in place."""
        return self.begin_sum_over_sequence_ranks(partial).wait()

    def begin_sum_over_sequence_ranks(self, partial: Tensor) -> Pending[Tensor]:
        """All-reduce in place, beside computing."""
        return _begin_sum(partial, self.sequence, "sequence")

    def gather_over_sequence_ranks(self, part: Tensor) -> Tensor:
        """All-gather tensors of one shape: [sequence_parallel, *part.shape]."""
        return self.begin_gather_over_sequence_ranks(part).wait()

    def exchange_over_sequence_ranks(self, parts: Tensor) -> Tensor:
        """Send part i to sequence rank i: [sequence_parallel, ...], of which part j came from j."""
        return _begin_exchange(parts, self.sequence, "sequence").wait()

    def begin_gather_over_sequence_ranks(
        self,
        part: Tensor,
        into: Tensor | None = None,
        then: Callable[[Tensor], None] | None = None,
    ) -> Pending[Tensor]:
        """All-gather tensors of one shape, [sequence_parallel, *part.shape], beside computing.

        Args:
            into: contiguous, to gather into; not used by anyone until it is waited for.
            then: what is done with that, beside computing as well.
        """
        return _begin_gather(part, into, then, self.sequence, "sequence")

    def broadcast_over_sequence_ranks(self, values: Tensor) -> Tensor:
        """Give all sequence ranks what the first has, in place."""
        if self.sequence is None:
            return values
        communicator = self.sequence

        def work() -> Tensor:
            communicator.broadcast(values)
            return values

        return aside(work, values.device, "sequence").wait()


def _begin_sum(partial: Tensor, ranks: Communicator | None, axis: str) -> Pending[Tensor]:
    if ranks is None:
        return Pending(partial)

    def work() -> Tensor:
        ranks.all_reduce(partial)
        return partial

    return aside(work, partial.device, axis)


def _begin_gather(
    part: Tensor,
    into: Tensor | None,
    then: Callable[[Tensor], None] | None,
    ranks: Communicator | None,
    axis: str,
) -> Pending[Tensor]:
    own = part.contiguous()
    if ranks is None:
        gathered = own[None]
        if then is not None:
            then(gathered)
        return Pending(gathered)
    # Allocated here and not aside: PyTorch keeps freed memory for the stream that took it.
    gathered = own.new_empty((ranks.size, *own.shape)) if into is None else into

    def work() -> Tensor:
        ranks.all_gather(gathered, own)
        if then is not None:
            then(gathered)
        return gathered

    return aside(work, own.device, axis)


def _begin_exchange(parts: Tensor, ranks: Communicator | None, axis: str) -> Pending[Tensor]:
    if ranks is None:
        return Pending(parts)
    own = parts.contiguous()
    received = torch.empty_like(own)

    def work() -> Tensor:
        ranks.all_to_all(received, own)
        return received

    return aside(work, own.device, axis)


def _own_group(groups: list[list[int]], rank: int) -> dist.ProcessGroup:
    """Make every group, as torch.distributed demands of every rank, and return this rank's."""
    made = [dist.new_group(ranks, timeout=_COLLECTIVE_TIMEOUT) for ranks in groups]
    own = next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)
    assert isinstance(own, dist.ProcessGroup)
    return own
