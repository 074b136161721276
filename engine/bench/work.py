"""What a model costs at least, counted from its sizes: operations, bytes, memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import ModelConfig

GB = 1e9
_RESERVE_BYTES = 1 << 30
"""The driver's context, workspaces of the libraries, and what fragmentation loses."""


@dataclass(frozen=True)
class Work:
    """Of a whole model, in weights of `itemsize` bytes."""

    config: ModelConfig
    itemsize: int = 2

    @property
    def products(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of a layer's four products: QKV, output, gate and up, down."""
        config = self.config
        hidden, middle = config.hidden_size, config.intermediate_size
        width, kv_width = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        return [
            (width + 2 * kv_width, hidden),
            (hidden, width),
            (2 * middle, hidden),
            (hidden, middle),
        ]

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's matrices."""
        return sum(outputs * inputs for outputs, inputs in self.products)

    @property
    def weight_bytes(self) -> int:
        """Of layers, embedding and head."""
        config = self.config
        tables = 1 if config.tie_word_embeddings else 2
        elements = config.num_layers * self.layer_weights
        return (elements + tables * config.vocab_size * config.hidden_size) * self.itemsize

    def linear_flops(self, tokens: int) -> float:
        """Of a prompt's linear layers. Of the last layer only K and V are wanted."""
        config = self.config
        last = 2 * config.num_kv_heads * config.head_dim * config.hidden_size
        return 2.0 * tokens * ((config.num_layers - 1) * self.layer_weights + last)

    def attention_flops(self, tokens: int) -> float:
        """Of a prompt's causal attention in all layers but the last, dense."""
        config = self.config
        pairs = tokens * (tokens + 1) / 2
        return 4.0 * config.head_dim * config.num_heads * pairs * (config.num_layers - 1)

    def decode_bytes(self, lengths: Sequence[int], kv_bytes_per_token: float) -> float:
        """Read by a step of sequences of these lengths: layers and head once, and all K and V."""
        head = self.config.vocab_size * self.config.hidden_size
        weights = (self.config.num_layers * self.layer_weights + head) * self.itemsize
        return weights + sum(lengths) * kv_bytes_per_token

    def activation_bytes(self, tokens: int, chunk_tokens: int) -> int:
        """About what is alive at once in a chunk, the reserve included; an upper estimate.

        A chunk's rows are alive as hidden states, some of them in float32, as queries in three
        rotations, and within the MLP; selection sums over all keys.
        """
        config = self.config
        width = config.num_heads * config.head_dim
        row = 4 * config.intermediate_size + 8 * config.hidden_size + 4 * width
        sums = 6 * 4 * config.num_heads * tokens
        return min(tokens, chunk_tokens) * row * self.itemsize + sums + _RESERVE_BYTES
