"""How sparse a checkpoint's prefill may be: budgets for every layer and query head."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels.sparse import HeadBudget
from ..errors import CheckpointError
from ..json_files import read_json
from ..memory.fit import WINDOW_TOKENS
from ..model.config import ModelConfig
from .budgets import BUDGETS_FILE, DENSE_UP_TO, has_budgets

_PATTERN = "vertical_and_slash"


@dataclass(frozen=True)
class SparsityConfig:
    """`budgets[layer][head]`; prompts of at most `threshold` tokens are prefilled densely.

    Every `window_tokens` rows of a prompt attend to what the last `last_queries` of them choose,
    however many rows are computed at once: as published, prompts are prefilled by so many.
    """

    budgets: tuple[tuple[HeadBudget, ...], ...]
    threshold: int = DENSE_UP_TO
    last_queries: int = 64
    window_tokens: int = WINDOW_TOKENS

    @classmethod
    def from_folder(cls, folder: Path) -> "SparsityConfig | None":
        """Read `sparse_attention_config.json` as published with Qwen2.5-1M; None where absent.

        The threshold and the number of queries may stand in config.json's
        `dual_chunk_attention_config`, under the names that vLLM reads.

        Raises:
            CheckpointError: malformed, or not for this model.
        """
        if not has_budgets(folder):
            return None
        keys = read_json(folder / "config.json").get("dual_chunk_attention_config") or {}
        path = folder / BUDGETS_FILE
        return cls.of(read_json(path), keys, ModelConfig.from_folder(folder), str(path))

    @classmethod
    def of(
        cls, layers: Any, keys: Mapping[str, Any], model: ModelConfig, source: str = BUDGETS_FILE
    ) -> "SparsityConfig":
        """From what `from_folder` reads.

        Args:
            layers: what stands in `sparse_attention_config.json`.
            keys: the `dual_chunk_attention_config`.
            source: where the layers are from, for messages.

        Raises:
            CheckpointError: malformed, or not for this model.
        """
        if not isinstance(layers, list) or len(layers) != model.num_layers:
            raise CheckpointError(f"{source} must be a list of {model.num_layers} layers")
        budgets = tuple(
            tuple(_budget(source, number, layer, head) for head in range(model.num_heads))
            for number, layer in enumerate(layers)
        )
        last_queries = keys.get("sparse_attention_last_q", cls.last_queries)
        if not isinstance(last_queries, int) or not 1 <= last_queries <= cls.last_queries:
            raise CheckpointError(
                f"config.json beside {source}: sparse_attention_last_q is {last_queries}; from 1 "
                f"to {cls.last_queries} queries can choose what a chunk attends to"
            )
        return cls(budgets, keys.get("sparse_attention_threshold", DENSE_UP_TO), last_queries)

    def heads(self, layer: int, start: int, end: int) -> list[HeadBudget]:
        """Budgets of the query heads [start, end) of one layer."""
        return list(self.budgets[layer][start:end])


def _budget(source: str, number: int, layer: Any, head: int) -> HeadBudget:
    try:
        pattern, verticals, slashes, _score = layer[str(head)]
        budget = HeadBudget(int(verticals), int(slashes))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: layer {number} has no entry of four values for head {head}"
        ) from error
    if pattern != _PATTERN:
        raise CheckpointError(f"{source}: pattern {pattern!r} is not supported, only {_PATTERN!r}")
    return budget
