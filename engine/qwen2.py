"""Qwen2: the weights of one rank and what a layer does to hidden states, attention aside.

Attention lives in the prefiller and the decoder, which know about pages; here are the pieces
before it (norm, QKV) and after it (output projection, MLP). Source: Qwen2 as published in
transformers' `Qwen2ForCausalLM`.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from .checkpoint import CheckpointReader, WeightSource
from .config import DualChunk, ModelConfig
from .mesh import Mesh
from .pages import PageGeometry
from .positions import RotaryPositions


@dataclass(frozen=True)
class HeadShare:
    """The heads of one tensor rank, half-open. KV heads are replicated where ranks outnumber them.

    `owns_kv`: whether this rank is the first that holds its KV heads; the owner hands them off.
    """

    first_head: int
    last_head: int
    first_kv_head: int
    last_kv_head: int
    owns_kv: bool

    @classmethod
    def of(cls, config: ModelConfig, tensor_parallel: int, tensor_rank: int) -> "HeadShare":
        """The share of one rank.

        Raises:
            ConfigurationError: the heads or the MLP do not divide.
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


class RMSNorm:
    """Root mean square norm (arXiv 1910.07467), computed in float32."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        self.weight = weight
        self.epsilon = epsilon

    def __call__(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        variance = wide.square().mean(-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(variance + self.epsilon)).to(hidden.dtype)


@dataclass(frozen=True)
class Layer:
    """One decoder layer's share of weights on this rank."""

    mesh: Mesh
    head_dim: int
    input_norm: RMSNorm
    query_weight: Tensor
    query_bias: Tensor
    key_value_weight: Tensor  # [2 * kv_heads * d, hidden]: keys, then values
    key_value_bias: Tensor
    output_weight: Tensor
    mlp_norm: RMSNorm
    gate_up_weight: Tensor  # [2 * intermediate, hidden]: gate, then up
    down_weight: Tensor

    def queries(self, normed: Tensor) -> Tensor:
        """[n, hidden] after `input_norm` to [n, heads, d], not rotated."""
        q = functional.linear(normed, self.query_weight, self.query_bias)
        return q.unflatten(-1, (-1, self.head_dim))

    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """[n, hidden] after `input_norm` to K and V, each [n, kv_heads, d], not rotated."""
        both = functional.linear(normed, self.key_value_weight, self.key_value_bias)
        k, v = both.unflatten(-1, (2, -1, self.head_dim)).unbind(1)
        return k, v

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm and QKV: [n, hidden] to q [n, heads, d], k and v [n, kv_heads, d]."""
        normed = self.input_norm(hidden)
        return self.queries(normed), *self.keys_values(normed)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP, with their residuals.

        Args:
            hidden: what went into the layer, [n, hidden].
            attended: this rank's heads, [n, heads, d].
        """
        attended = functional.linear(attended.flatten(1), self.output_weight)
        hidden = hidden + self.mesh.sum_over_tensor_ranks(attended)
        gate, up = functional.linear(self.mlp_norm(hidden), self.gate_up_weight).chunk(2, dim=-1)
        down = functional.linear(functional.silu(gate) * up, self.down_weight)
        return hidden + self.mesh.sum_over_tensor_ranks(down)


class Qwen2:
    """The weights of one rank. Embedding and head are whole on every rank."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        layers: list[Layer],
        embedding: Tensor,
        norm: RMSNorm,
        head: Tensor,
    ) -> None:
        self.config = config
        self.mesh = mesh
        self.layers = layers
        self.positions = RotaryPositions(config)
        self.heads = HeadShare.of(config, mesh.tensor_parallel, mesh.tensor_rank)
        self._embedding = embedding
        self.norm = norm
        self.head = head

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, hidden states and pages."""
        return self._embedding.dtype

    @property
    def page_geometry(self) -> PageGeometry:
        """The pages that this rank's share of heads needs."""
        return PageGeometry(
            self.config.num_layers, self.heads.num_kv_heads, self.config.head_dim, self.dtype
        )

    @classmethod
    def load(cls, folder: Path, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> "Qwen2":
        """Read this rank's share of a checkpoint folder.

        Raises:
            CheckpointError: not a whole Qwen2 checkpoint.
            ConfigurationError: the mesh does not divide the model.
        """
        config = ModelConfig.from_folder(folder)
        config.check_tensor_parallel(mesh.tensor_parallel)
        with CheckpointReader(folder) as reader:
            return cls.from_weights(config, reader, mesh, dtype, device)

    @classmethod
    def from_weights(
        cls,
        config: ModelConfig,
        source: WeightSource,
        mesh: Mesh,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Qwen2":
        """Take this rank's share of weights from wherever they come.

        Raises:
            CheckpointError: the source lacks a tensor, or has another shape.
            ConfigurationError: the mesh does not divide the model.
        """
        share = HeadShare.of(config, mesh.tensor_parallel, mesh.tensor_rank)
        loader = _Loader(config, mesh, share, source, dtype, device)
        layers = [loader.layer(number) for number in range(config.num_layers)]
        shape = (config.vocab_size, config.hidden_size)
        embedding = loader.read("model.embed_tokens.weight", shape)
        head = embedding if config.tie_word_embeddings else loader.read("lm_head.weight", shape)
        return cls(config, mesh, layers, embedding, loader.norm("model.norm.weight"), head)

    def with_dual_chunk(self, dual_chunk: DualChunk | None) -> "Qwen2":
        """The same weights, not copied, under other positions; None makes them plain."""
        config = replace(self.config, dual_chunk=dual_chunk)
        return Qwen2(config, self.mesh, self.layers, self._embedding, self.norm, self.head)

    def embed(self, tokens: Tensor) -> Tensor:
        """[n] int64 to [n, hidden]."""
        return functional.embedding(tokens, self._embedding)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: [n, hidden] to float32 [n, vocab]."""
        return functional.linear(self.norm(hidden), self.head).float()


class _Loader:
    """Cuts a checkpoint's tensors into one rank's share."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        share: HeadShare,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._config, self._mesh, self._source = config, mesh, source
        self._dtype, self._device = dtype, device
        head_dim = config.head_dim
        self._query_rows = slice(share.first_head * head_dim, share.last_head * head_dim)
        self._kv_rows = slice(share.first_kv_head * head_dim, share.last_kv_head * head_dim)
        columns = config.intermediate_size // mesh.tensor_parallel
        self._mlp_rows = slice(columns * mesh.tensor_rank, columns * (mesh.tensor_rank + 1))

    def read(
        self, name: str, shape: tuple[int, ...], rows: slice | None = None, axis: int = 0
    ) -> Tensor:
        tensor = self._source.read(name, shape, rows, axis)
        return tensor.to(device=self._device, dtype=self._dtype).contiguous()

    def norm(self, name: str) -> RMSNorm:
        weight = self.read(name, (self._config.hidden_size,))
        return RMSNorm(weight, self._config.rms_norm_eps)

    def layer(self, number: int) -> Layer:
        config, prefix = self._config, f"model.layers.{number}"
        hidden, middle = config.hidden_size, config.intermediate_size
        width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"

        def key_value(kind: str, *columns: int) -> Tensor:
            parts = [
                self.read(f"{attention}.{name}.{kind}", (kv_width, *columns), self._kv_rows)
                for name in ("k_proj", "v_proj")
            ]
            return torch.cat(parts)

        gate_up = [
            self.read(f"{mlp}.{name}.weight", (middle, hidden), self._mlp_rows)
            for name in ("gate_proj", "up_proj")
        ]
        return Layer(
            mesh=self._mesh,
            head_dim=config.head_dim,
            input_norm=self.norm(f"{prefix}.input_layernorm.weight"),
            query_weight=self.read(f"{attention}.q_proj.weight", (width, hidden), self._query_rows),
            query_bias=self.read(f"{attention}.q_proj.bias", (width,), self._query_rows),
            key_value_weight=key_value("weight", hidden),
            key_value_bias=key_value("bias"),
            output_weight=self.read(
                f"{attention}.o_proj.weight", (hidden, width), self._query_rows, axis=1
            ),
            mlp_norm=self.norm(f"{prefix}.post_attention_layernorm.weight"),
            gate_up_weight=torch.cat(gate_up),
            down_weight=self.read(
                f"{mlp}.down_proj.weight", (hidden, middle), self._mlp_rows, axis=1
            ),
        )
