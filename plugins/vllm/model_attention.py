"""What attention must know of a model: its positions, its heads on this rank, and its budgets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...engine.model.config import ModelConfig
from ...engine.model.positions import RotaryPositions
from ...engine.prefill.sparsity import SparsityConfig
from ...kernels.sparse import HeadBudget

DUAL_CHUNK_KEY = "dual_chunk_attention_config"
_BUDGETS_KEY = "sparse_attention_config"


@dataclass(frozen=True, eq=False)
class ModelAttention:
    """`num_heads` query heads from `first_head` on, and the KV heads that they share.

    Without `sparsity` every prompt is prefilled densely.
    """

    positions: RotaryPositions
    sparsity: SparsityConfig | None
    first_head: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(
        cls, raw: Mapping[str, Any], num_heads: int, num_kv_heads: int, rank: int
    ) -> "ModelAttention":
        """Of a model with Dual Chunk Attention, on one of the ranks that divide its heads.

        Args:
            raw: its `config.json`; budgets may have been put into `dual_chunk_attention_config`.

        Raises:
            CheckpointError: what it says does not go together.
            KeyError: it does not say enough.
        """
        config = ModelConfig.from_json(raw)
        return cls(
            RotaryPositions(config),
            sparsity_of(raw),
            rank * num_heads,
            num_heads,
            num_kv_heads,
            config.head_dim,
        )

    @property
    def stride(self) -> int | None:
        """Tokens of one dual chunk."""
        return self.positions.stride

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    def is_sparse(self, prompt: int) -> bool:
        """Whether a prompt of so many tokens is prefilled sparsely."""
        return self.sparsity is not None and prompt > self.sparsity.threshold

    def budgets(self, layer: int) -> list[HeadBudget]:
        """Of this rank's heads in one layer."""
        assert self.sparsity is not None
        return self.sparsity.heads(layer, self.first_head, self.first_head + self.num_heads)


def sparsity_of(raw: Mapping[str, Any]) -> SparsityConfig | None:
    """The budgets that lie in a model's `dual_chunk_attention_config`, unless they are off.

    Raises:
        CheckpointError: they are malformed, or not for this model.
    """
    keys = raw[DUAL_CHUNK_KEY]
    layers = keys.get(_BUDGETS_KEY)
    if not layers or not keys.get("sparse_attention_enabled", True):
        return None
    return SparsityConfig.of(layers, keys, ModelConfig.from_json(raw))


def alike_up_to(raw: Mapping[str, Any]) -> int:
    """The longest prompt whose K and V are the same whatever follows them.

    Those of a longer one depend on its whole length: by temperature, and by what sparse attention
    left out. Another prompt that begins alike must not take them for its own.
    """
    sparsity = sparsity_of(raw)
    original = raw[DUAL_CHUNK_KEY]["original_max_position_embeddings"]
    return original if sparsity is None else min(original, sparsity.threshold)
