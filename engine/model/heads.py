"""Which heads of a model a tensor rank holds."""

from dataclasses import dataclass

from .config import ModelConfig


@dataclass(frozen=True)
class RankHeads:
    """The heads of one tensor rank, half-open. KV heads are replicated where ranks outnumber them.

    `owns_kv`: whether this rank is the first that holds its KV heads; the owner hands them off.
    """

    first_head: int
    last_head: int
    first_kv_head: int
    last_kv_head: int
    owns_kv: bool

    @classmethod
    def of(cls, config: ModelConfig, tensor_parallel: int, tensor_rank: int) -> "RankHeads":
        """Those of one rank.

        Raises:
            TensorParallelError: the heads or the MLP do not divide.
        """
        config.check_tensor_parallel(tensor_parallel)
        heads = config.num_heads // tensor_parallel
        group = config.num_heads // config.num_kv_heads
        first = tensor_rank * heads
        return cls(
            first,
            first + heads,
            first // group,
            -(-(first + heads) // group),
            first % group == 0,
        )

    @property
    def num_heads(self) -> int:
        """Query heads held."""
        return self.last_head - self.first_head

    @property
    def num_kv_heads(self) -> int:
        """KV heads held."""
        return self.last_kv_head - self.first_kv_head
