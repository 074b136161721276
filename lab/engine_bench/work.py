"""What a model costs at least, counted from its sizes: operations and bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...engine.memory.fit import Weights
from ...engine.model.config import ModelConfig, WeightFormat


@dataclass(frozen=True)
class Work:
    """Of a whole model, in weights of `itemsize` bytes, or of one where they are `kept` so."""

    config: ModelConfig
    itemsize: int = 2
    kept: WeightFormat = "auto"

    @property
    def weights(self) -> Weights:
        """What is multiplied with."""
        return Weights(self.config, self.itemsize, kept=self.kept)

    def linear_flops(self, tokens: int) -> float:
        """Of a prompt's linear layers. Of the last layer only K and V are wanted."""
        config = self.config
        last = 2 * config.num_kv_heads * config.head_dim * config.hidden_size
        return 2.0 * tokens * ((config.num_layers - 1) * self.weights.layer_elements + last)

    def attention_flops(self, tokens: int) -> float:
        """Of a prompt's causal attention in all layers but the last, dense."""
        config = self.config
        pairs = tokens * (tokens + 1) / 2
        return 4.0 * config.head_dim * config.num_heads * pairs * (config.num_layers - 1)

    def decode_bytes(self, lengths: Sequence[int], kv_bytes_per_token: float) -> float:
        """Read by a step of sequences of these lengths: layers and head once, and all K and V."""
        head = self.config.vocab_size * self.config.hidden_size * self.itemsize
        return self.weights.layers_bytes + head + sum(lengths) * kv_bytes_per_token
