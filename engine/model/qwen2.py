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

from ...kernels import elementwise
from ..errors import MixedPrecisionError
from ..kv.pages import PageGeometry
from ..parallel.mesh import Mesh
from ..stages import UNTIMED, Stages
from .checkpoint import CheckpointReader, WeightSource
from .config import DualChunk, KVCacheDtype, ModelConfig
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


@dataclass(frozen=True)
class RMSNorm:
    """Root mean square norm (arXiv 1910.07467), computed in float32."""

    weight: Tensor
    epsilon: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """[n, hidden] to the same, normed."""
        return elementwise.rms_norm(hidden, self.weight, self.epsilon)

    def add(self, more: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Norm of residual + more, and that sum, each [n, hidden]."""
        return elementwise.add_rms_norm(more, residual, self.weight, self.epsilon)


@dataclass(frozen=True)
class Layer:
    """One decoder layer's share of weights on this rank.

    Hidden states come as a pair: the residual stream, and that normed for what is next.
    """

    mesh: Mesh
    head_dim: int
    num_heads: int
    input_norm: RMSNorm
    qkv_weight: Tensor  # [(heads + 2 * kv_heads) * d, hidden]: queries, keys, values
    qkv_bias: Tensor
    output_weight: Tensor
    mlp_norm: RMSNorm
    gate_up_weight: Tensor  # [2 * intermediate, hidden]: gate, then up
    down_weight: Tensor

    def queries(self, normed: Tensor) -> Tensor:
        """[n, hidden] after `input_norm` to [n, heads, d], not rotated."""
        rows = slice(0, self.num_heads * self.head_dim)
        q = functional.linear(normed, self.qkv_weight[rows], self.qkv_bias[rows])
        return q.unflatten(-1, (-1, self.head_dim))

    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """[n, hidden] after `input_norm` to K and V, each [n, kv_heads, d], not rotated.

        They are views, with rows apart.
        """
        rows = slice(self.num_heads * self.head_dim, None)
        both = functional.linear(normed, self.qkv_weight[rows], self.qkv_bias[rows])
        k, v = both.unflatten(-1, (2, -1, self.head_dim)).unbind(1)
        return k, v

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, hidden] after `input_norm` to q [n, heads, d], k and v [n, kv_heads, d].

        They are views of one tensor, with rows apart.
        """
        return self.split(functional.linear(normed, self.qkv_weight, self.qkv_bias))

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of [n, (heads + 2 * kv_heads) * d], as `project` returns them."""
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        kv_heads = (heads.shape[1] - self.num_heads) // 2
        q, k, v = heads.split_with_sizes((self.num_heads, kv_heads, kv_heads), 1)
        return q, k, v

    def finish(
        self, attended: Tensor, residual: Tensor, next_norm: RMSNorm, stages: Stages = UNTIMED
    ) -> tuple[Tensor, Tensor]:
        """Output projection and MLP, with their residuals.

        Args:
            attended: this rank's heads, [n, heads, d].
            residual: what went into the layer, not normed, [n, hidden].
            next_norm: of what comes after this layer.

        Returns:
            Hidden states [n, hidden], normed by `next_norm`; and as they are, the new residual.
        """
        with stages.time("linear"):
            attended = functional.linear(attended.flatten(1), self.output_weight)
        normed, residual = self._add(attended, residual, self.mlp_norm, stages)
        with stages.time("linear"):
            gate_up = functional.linear(normed, self.gate_up_weight)
        # What is not needed any more is let go of at once: gate and up are the widest there is.
        del attended, normed
        with stages.time("elementwise"):
            activated = elementwise.swiglu(gate_up)
        del gate_up
        with stages.time("linear"):
            down = functional.linear(activated, self.down_weight)
        del activated
        return self._add(down, residual, next_norm, stages)

    def _add(
        self, partial: Tensor, residual: Tensor, norm: RMSNorm, stages: Stages
    ) -> tuple[Tensor, Tensor]:
        """Sum a product over the tensor ranks, add it to the residual, and norm that."""
        if self.mesh.tensor_parallel > 1:
            with stages.time("communication"):
                partial = self.mesh.sum_over_tensor_ranks(partial)
        with stages.time("elementwise"):
            return norm.add(partial, residual)


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
        """Of weights and hidden states, and of pages that are not kept in another."""
        return self._embedding.dtype

    @property
    def page_geometry(self) -> PageGeometry:
        """The pages that this rank's share of heads needs."""
        return PageGeometry(
            self.config.num_layers, self.heads.num_kv_heads, self.config.head_dim, self.dtype
        )

    def pages_kept_as(self, kv_cache_dtype: KVCacheDtype) -> PageGeometry:
        """The same in another format.

        Raises:
            MixedPrecisionError: a GPU's kernels do not read it beside this model's type.
        """
        geometry = self.page_geometry.kept_as(kv_cache_dtype)
        same = geometry.dtype == self.dtype
        if self.device.type == "cuda" and not (same or geometry.quantized):
            raise MixedPrecisionError(kv_cache_dtype, str(self.dtype).removeprefix("torch."))
        return geometry

    @classmethod
    def load(cls, folder: Path, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> "Qwen2":
        """Read this rank's share of a checkpoint folder.

        Raises:
            CheckpointError: not a whole Qwen2 checkpoint.
            TensorParallelError: the mesh does not divide the model.
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
            TensorParallelError: the mesh does not divide the model.
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

    def norm_after(self, number: int) -> RMSNorm:
        """The norm that follows on a layer: the next layer's, or the final one."""
        last = number == len(self.layers) - 1
        return self.norm if last else self.layers[number + 1].input_norm

    def logits(self, normed: Tensor) -> Tensor:
        """The head: [n, hidden] after the final norm to float32 [n, vocab]."""
        return functional.linear(normed, self.head).float()


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
        self._num_heads = share.num_heads
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

        def qkv(kind: str, *columns: int) -> Tensor:
            shares = (
                ("q_proj", width, self._query_rows),
                ("k_proj", kv_width, self._kv_rows),
                ("v_proj", kv_width, self._kv_rows),
            )
            parts = [
                self.read(f"{attention}.{name}.{kind}", (size, *columns), rows)
                for name, size, rows in shares
            ]
            return torch.cat(parts)

        gate_up = [
            self.read(f"{mlp}.{name}.weight", (middle, hidden), self._mlp_rows)
            for name in ("gate_proj", "up_proj")
        ]
        return Layer(
            mesh=self._mesh,
            head_dim=config.head_dim,
            num_heads=self._num_heads,
            input_norm=self.norm(f"{prefix}.input_layernorm.weight"),
            qkv_weight=qkv("weight", hidden),
            qkv_bias=qkv("bias"),
            output_weight=self.read(
                f"{attention}.o_proj.weight", (hidden, width), self._query_rows, axis=1
            ),
            mlp_norm=self.norm(f"{prefix}.post_attention_layernorm.weight"),
            gate_up_weight=torch.cat(gate_up),
            down_weight=self.read(
                f"{mlp}.down_proj.weight", (hidden, middle), self._mlp_rows, axis=1
            ),
        )
