"""The ranks that share one model: tensor parallel × sequence parallel.

Tensor ranks are neighbours: rank = sequence_rank * tensor_parallel + tensor_rank. Tensor parallel
shards heads and MLP; sequence parallel shards the rows of every prefill chunk. All communication
of the engine goes through here, so a mesh of one communicates nothing.

What is begun runs beside whatever the caller computes until it waits: see `aside`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigurationError
from .aside import Pending, aside

_COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Mesh:
    """One rank's place, and its two process groups (None where an axis has one rank)."""

    tensor_parallel: int
    sequence_parallel: int
    rank: int
    tensor_group: dist.ProcessGroup | None = None
    sequence_group: dist.ProcessGroup | None = None

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
        return cls(
            tensor_parallel,
            sequence_parallel,
            rank,
            _own_group(tensor_groups, rank) if tensor_parallel > 1 else None,
            _own_group(sequence_groups, rank) if sequence_parallel > 1 else None,
        )

    def close(self) -> None:
        """Leave; the other ranks must not communicate any more."""
        if self.tensor_group is not None or self.sequence_group is not None:
            dist.destroy_process_group()

    def sum_over_tensor_ranks(self, partial: Tensor) -> Tensor:
        """All-reduce in place."""
        return self.begin_sum_over_tensor_ranks(partial).wait()

    def begin_sum_over_tensor_ranks(self, partial: Tensor) -> Pending[Tensor]:
        """All-reduce in place, beside computing."""
        return _begin_sum(partial, self.tensor_group, "tensor")

    def gather_over_tensor_ranks(self, part: Tensor) -> Tensor:
        """All-gather tensors of one shape: [tensor_parallel, *part.shape]."""
        return _begin_gather(part, None, None, self.tensor_group, "tensor").wait()

    def sum_over_sequence_ranks(self, partial: Tensor) -> Tensor:
        """All-reduce in place."""
        return self.begin_sum_over_sequence_ranks(partial).wait()

    def begin_sum_over_sequence_ranks(self, partial: Tensor) -> Pending[Tensor]:
        """All-reduce in place, beside computing."""
        return _begin_sum(partial, self.sequence_group, "sequence")

    def gather_over_sequence_ranks(self, part: Tensor) -> Tensor:
        """All-gather tensors of one shape: [sequence_parallel, *part.shape]."""
        return self.begin_gather_over_sequence_ranks(part).wait()

    def exchange_over_sequence_ranks(self, parts: Tensor) -> Tensor:
        """Send part i to sequence rank i: [sequence_parallel, ...], of which part j came from j."""
        return _begin_exchange(parts, self.sequence_group, "sequence").wait()

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
        return _begin_gather(part, into, then, self.sequence_group, "sequence")


def _begin_sum(partial: Tensor, group: dist.ProcessGroup | None, axis: str) -> Pending[Tensor]:
    if group is None:
        return Pending(partial)

    def work() -> Tensor:
        dist.all_reduce(partial, group=group)
        return partial

    return aside(work, partial.device, axis)


def _begin_gather(
    part: Tensor,
    into: Tensor | None,
    then: Callable[[Tensor], None] | None,
    group: dist.ProcessGroup | None,
    axis: str,
) -> Pending[Tensor]:
    own = part.contiguous()
    if group is None:
        gathered = own[None]
        if then is not None:
            then(gathered)
        return Pending(gathered)
    # Allocated here and not aside: PyTorch keeps freed memory for the stream that took it.
    gathered = own.new_empty((group.size(), *own.shape)) if into is None else into

    def work() -> Tensor:
        # Flat, because backends differ in which shapes they take.
        dist.all_gather_into_tensor(gathered.view(-1), own.view(-1), group=group)
        if then is not None:
            then(gathered)
        return gathered

    return aside(work, own.device, axis)


def _begin_exchange(parts: Tensor, group: dist.ProcessGroup | None, axis: str) -> Pending[Tensor]:
    if group is None:
        return Pending(parts)
    own = parts.contiguous()
    received = torch.empty_like(own)

    def work() -> Tensor:
        dist.all_to_all_single(received.view(-1), own.view(-1), group=group)
        return received

    return aside(work, own.device, axis)


def _own_group(groups: list[list[int]], rank: int) -> dist.ProcessGroup:
    """Make every group, as torch.distributed demands of every rank, and return this rank's."""
    made = [dist.new_group(ranks, timeout=_COLLECTIVE_TIMEOUT) for ranks in groups]
    own = next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)
    assert isinstance(own, dist.ProcessGroup)
    return own
