"""The ranks that share one model: tensor parallel × sequence parallel.

Tensor ranks are neighbours: rank = sequence_rank * tensor_parallel + tensor_rank. Tensor parallel
shards heads and MLP; sequence parallel shards the rows of every prefill chunk. All communication
of the engine goes through here, so a mesh of one communicates nothing.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigurationError

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
        if self.tensor_group is not None:
            dist.all_reduce(partial, group=self.tensor_group)
        return partial

    def sum_over_sequence_ranks(self, partial: Tensor) -> Tensor:
        """All-reduce in place."""
        if self.sequence_group is not None:
            dist.all_reduce(partial, group=self.sequence_group)
        return partial

    def gather_over_sequence_ranks(self, rows: Tensor) -> Tensor:
        """All-gather tensors of one shape: [sequence_parallel, *rows.shape]."""
        if self.sequence_group is None:
            return rows[None]
        gathered = rows.new_empty((self.sequence_parallel, *rows.shape))
        parts = list(gathered.unbind(0))
        dist.all_gather(parts, rows.contiguous(), group=self.sequence_group)
        return gathered


def _own_group(groups: list[list[int]], rank: int) -> dist.ProcessGroup:
    """Make every group, as torch.distributed demands of every rank, and return this rank's."""
    made = [dist.new_group(ranks, timeout=_COLLECTIVE_TIMEOUT) for ranks in groups]
    own = next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)
    assert isinstance(own, dist.ProcessGroup)
    return own
