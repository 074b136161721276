"""Qwen2: one rank's weights, and its way from tokens to logits, attention aside.

Attention lives in the prefiller and the decoder, which know about pages; what a layer does besides
is in `layer`. Source: Qwen2 as published in transformers' `Qwen2ForCausalLM`.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from ...kernels.narrow import BLOCK, Narrowing, Rows
from ..errors import (
    CheckpointError,
    DividedBlockError,
    MixedPrecisionError,
    NarrowComputeError,
    NoNarrowProductsError,
)
from ..kv.formats import KVCacheDtype
from ..kv.pages import PageGeometry
from ..parallel.mesh import Mesh
from ..stages import UNTIMED, Stages
from .checkpoint import CheckpointReader, WeightSource
from .config import DualChunk, ModelConfig, WeightFormat
from .heads import RankHeads
from .layer import Layer, RMSNorm
from .linear import Linear, Matrix, WideLinear
from .positions import RotaryPositions
from .vocabulary import VocabularyPart


@dataclass(frozen=True, eq=False)
class Qwen2:
    """The weights of one rank. Tensor ranks deal the rows of embedding and head, see `vocabulary`.

    Published models have more rows in both than their tokenizers have ids. Those from `num_tokens`
    on are no tokens: nothing trained them, and no logit makes one of them possible.
    """

    config: ModelConfig
    mesh: Mesh
    embedding: Tensor  # [own part of the vocabulary, hidden]
    first_norm: RMSNorm
    layers: tuple[Layer, ...]
    head: Linear
    num_tokens: int

    @cached_property
    def positions(self) -> RotaryPositions:
        """What queries and keys are rotated by."""
        return RotaryPositions(self.config)

    @cached_property
    def vocabulary(self) -> VocabularyPart:
        """The tokens whose rows of embedding and head this rank holds."""
        return VocabularyPart.of(self.config.vocab_size, self.mesh)

    @cached_property
    def heads(self) -> RankHeads:
        """The heads of this rank."""
        return RankHeads.of(self.config, self.mesh.tensor_parallel, self.mesh.tensor_rank)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states, and of pages that are not kept in another."""
        return self.embedding.dtype

    @property
    def page_geometry(self) -> PageGeometry:
        """The pages that this rank's heads need."""
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

    def on_mesh(self, mesh: Mesh) -> "Qwen2":
        """The same weights on another mesh, whose tensor ranks are the same."""
        layers = tuple(replace(layer, mesh=mesh) for layer in self.layers)
        return replace(self, mesh=mesh, layers=layers)

    @classmethod
    def load(
        cls,
        folder: Path,
        mesh: Mesh,
        dtype: torch.dtype,
        device: torch.device,
        weights: WeightFormat = "auto",
    ) -> "Qwen2":
        """Read this rank's shard of a checkpoint folder, which need not have a tokenizer.

        Raises:
            CheckpointError: not a whole Qwen2 checkpoint.
            TensorParallelError: the mesh does not divide the model.
            ConfigurationError: its weights are of 8 bits, and cannot be used here.
        """
        config = ModelConfig.from_folder(folder)
        config.check_tensor_parallel(mesh.tensor_parallel)
        with CheckpointReader(folder) as reader:
            return cls.from_weights(config, reader, mesh, dtype, device, weights)

    @classmethod
    def from_weights(
        cls,
        config: ModelConfig,
        source: WeightSource,
        mesh: Mesh,
        dtype: torch.dtype,
        device: torch.device,
        weights: WeightFormat = "auto",
    ) -> "Qwen2":
        """Take this rank's shard of weights from wherever they come; every row is a token.

        Args:
            weights: "fp8" rounds linear layers' as they are read. Embedding and head stay as they
                are, and so does all that a quantized checkpoint has.

        Raises:
            CheckpointError: the source lacks a tensor, or has another shape.
            TensorParallelError: the mesh does not divide the model.
            ConfigurationError: weights are of 8 bits, and cannot be used here.
        """
        if weights == "fp8" or config.quantization is not None:
            _check_narrow_products(dtype, device)
        heads = RankHeads.of(config, mesh.tensor_parallel, mesh.tensor_rank)
        loader = _Loader(config, mesh, heads, source, dtype, device, weights)
        embedding = loader.vocabulary("model.embed_tokens.weight")
        head = WideLinear(embedding) if config.tie_word_embeddings else loader.head()
        layers: list[Layer] = []
        # From the last to the first: a norm narrows for the product behind it.
        norm = loader.norm("model.norm.weight", head.takes)
        for number in reversed(range(config.num_layers)):
            layers.insert(0, loader.layer(number, norm))
            norm = loader.first_norm(number, layers[0].qkv.takes)
        return cls(config, mesh, embedding, norm, tuple(layers), head, config.vocab_size)

    def with_dual_chunk(self, dual_chunk: DualChunk | None) -> "Qwen2":
        """The same weights, not copied, under other positions; None makes them plain."""
        return replace(self, config=replace(self.config, dual_chunk=dual_chunk))

    def with_tokens(self, num_tokens: int) -> "Qwen2":
        """The same weights, not copied, for a tokenizer whose ids lie below `num_tokens`."""
        return replace(self, num_tokens=num_tokens)

    def for_one_row(self) -> "Qwen2":
        """The same weights, not copied, for one token at a time; see `Linear.for_one_row`."""
        layers = tuple(layer.for_one_row() for layer in self.layers)
        return replace(self, layers=layers, head=self.head.for_one_row())

    def begin(self, tokens: Tensor, stages: Stages = UNTIMED) -> list[Rows]:
        """Tokens int64 [n] to what the first layer takes: [normed, residual], each [n, hidden]."""
        with stages.time("linear"):
            residual = self.vocabulary.embed(tokens, self.embedding)
        if self.mesh.tensor_parallel > 1:
            with stages.time("communication"):
                residual = self.mesh.sum_over_tensor_ranks(residual)
        with stages.time("elementwise"):
            return [self.first_norm(residual), residual]

    def logits(self, normed: Rows) -> Tensor:
        """Hidden states after the last norm, [n, hidden], to [n, vocab] in the model's type.

        Collective over the tensor ranks.

        Every logit of the engine comes from here, so what is no token is impossible everywhere.
        """
        logits = self.head(normed)
        if self.mesh.tensor_parallel > 1:
            logits = self.vocabulary.joined(self.mesh.gather_over_tensor_ranks(logits))
        logits[:, self.num_tokens :].fill_(-torch.inf)
        return logits


def _check_narrow_products(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse weights of 8 bits where a GPU cannot multiply them."""
    if device.type != "cuda":
        return
    if dtype != torch.bfloat16:
        raise NarrowComputeError(str(dtype).removeprefix("torch."))
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise NoNarrowProductsError(torch.cuda.get_device_name(device))


class _Loader:
    """Cuts one rank's shard out of a checkpoint's tensors."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        heads: RankHeads,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        weights: WeightFormat,
    ) -> None:
        self._config, self._mesh, self._source = config, mesh, source
        self._weights: WeightFormat = weights
        self._dtype, self._device = dtype, device
        head_dim = config.head_dim
        self._num_heads = heads.num_heads
        self._query_rows = slice(heads.first_head * head_dim, heads.last_head * head_dim)
        self._kv_rows = slice(heads.first_kv_head * head_dim, heads.last_kv_head * head_dim)
        columns = config.intermediate_size // mesh.tensor_parallel
        self._mlp_rows = slice(columns * mesh.tensor_rank, columns * (mesh.tensor_rank + 1))

    def read(
        self, name: str, shape: tuple[int, ...], rows: slice | None = None, axis: int = 0
    ) -> Tensor:
        tensor = self._source.read(name, shape, rows, axis)
        if tensor.itemsize == 1:
            raise CheckpointError(f"{name} is of 8 bits, which config.json does not say")
        return tensor.to(device=self._device, dtype=self._dtype).contiguous()

    def vocabulary(self, name: str) -> Tensor:
        """This rank's rows of a table of all tokens, filled up with zeros."""
        config, own = self._config, VocabularyPart.of(self._config.vocab_size, self._mesh)
        table = self.read(name, (config.vocab_size, config.hidden_size), own.rows)
        return functional.pad(table, (0, 0, 0, own.size - len(table)))

    def norm(self, name: str, narrowing: Narrowing | None) -> RMSNorm:
        weight = self.read(name, (self._config.hidden_size,))
        return RMSNorm(weight, self._config.rms_norm_eps, narrowing)

    def first_norm(self, number: int, narrowing: Narrowing | None) -> RMSNorm:
        return self.norm(f"model.layers.{number}.input_layernorm.weight", narrowing)

    def head(self) -> Linear:
        """Rounded by no one who reads a checkpoint of more bits: it decides between all tokens."""
        quantization = self._config.quantization
        if quantization is None or not quantization.covers("lm_head"):
            return WideLinear(self.vocabulary("lm_head.weight"))
        own = VocabularyPart.of(self._config.vocab_size, self._mesh)
        shape = (self._config.vocab_size, self._config.hidden_size)
        return self._narrow_matrix("lm_head", shape, own.rows, 0).filled_up(own.size).linear()

    def layer(self, number: int, next_norm: RMSNorm) -> Layer:
        config, prefix = self._config, f"model.layers.{number}"
        hidden, middle = config.hidden_size, config.intermediate_size
        width = config.num_heads * config.head_dim
        gate_up = self._gate_up(f"{prefix}.mlp")
        return Layer(
            number=number,
            mesh=self._mesh,
            head_dim=config.head_dim,
            num_heads=self._num_heads,
            qkv=self._qkv(f"{prefix}.self_attn"),
            output=self._columns(f"{prefix}.self_attn.o_proj", (hidden, width), self._query_rows),
            mlp_norm=self.norm(f"{prefix}.post_attention_layernorm.weight", gate_up.takes),
            gate_up=gate_up,
            down=self._columns(f"{prefix}.mlp.down_proj", (hidden, middle), self._mlp_rows),
            next_norm=next_norm,
        )

    def _columns(self, module: str, shape: tuple[int, int], columns: slice) -> Linear:
        """Of a product that takes this rank's part of what another one gave."""
        return self._matrix(module, shape, columns, axis=1).linear()

    def _qkv(self, prefix: str) -> Linear:
        config = self._config
        width, kv_width = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        projections = [
            (f"{prefix}.q_proj", width, self._query_rows),
            (f"{prefix}.k_proj", kv_width, self._kv_rows),
            (f"{prefix}.v_proj", kv_width, self._kv_rows),
        ]
        bias = torch.cat(
            [self.read(f"{name}.bias", (outputs,), rows) for name, outputs, rows in projections]
        )
        return self._joined(projections).linear(bias)

    def _gate_up(self, prefix: str) -> Linear:
        names, outputs = ("gate_proj", "up_proj"), self._config.intermediate_size
        return self._joined(
            [(f"{prefix}.{name}", outputs, self._mlp_rows) for name in names]
        ).linear()

    def _joined(self, parts: list[tuple[str, int, slice]]) -> Matrix:
        """This rank's rows of several matrices that take the same: name, outputs, rows of each."""
        hidden = self._config.hidden_size
        matrices = [self._matrix(name, (outputs, hidden), rows) for name, outputs, rows in parts]
        if len({matrix.scales is None for matrix in matrices}) > 1:
            names = ", ".join(name for name, _, _ in parts)
            raise CheckpointError(f"of {names} some are of 8 bits and some are not")
        return Matrix.joined(matrices)

    def _matrix(self, module: str, shape: tuple[int, int], part: slice, axis: int = 0) -> Matrix:
        """Numbers `part` along `axis` of a layer's weights, as they are kept."""
        if not self._config.keeps_narrow(module, self._weights):
            return Matrix(self.read(f"{module}.weight", shape, part, axis))
        if self._config.quantization is not None:
            return self._narrow_matrix(module, shape, part, axis)
        return Matrix.narrowed(self.read(f"{module}.weight", shape, part, axis))

    def _narrow_matrix(
        self, module: str, shape: tuple[int, int], part: slice | None, axis: int
    ) -> Matrix:
        """As a quantized checkpoint has it."""
        weight = self._source.read(f"{module}.weight", shape, part, axis)
        if weight.dtype != torch.float8_e4m3fn:
            raise CheckpointError(
                f"{module}.weight is of {weight.dtype}, but config.json makes it of 8 bits (e4m3)"
            )
        bits = weight.view(torch.uint8).to(self._device).contiguous()
        scales = self._scales(module, shape, part, axis, len(weight))
        scales = scales.to(device=self._device, dtype=torch.float32).contiguous()
        return Matrix(bits.view(torch.float8_e4m3fn), scales)

    def _scales(
        self, module: str, shape: tuple[int, int], part: slice | None, axis: int, outputs: int
    ) -> Tensor:
        """Those of a part of a matrix that has so many outputs: [outputs], or by blocks."""
        quantization = self._config.quantization
        assert quantization is not None
        name = f"{module}.{quantization.scale_name}"
        stored, possible = self._source.shape(name), quantization.scale_shapes(*shape)
        # What no shape fits is said by whoever reads it.
        own = stored if stored in possible else possible[0]
        match quantization.layout:
            case "tensor":
                return self._source.read(name, own).reshape(1).expand(outputs)
            case "channel":
                return self._source.read(name, own, part if axis == 0 else None).reshape(-1)
            case "block":
                blocks = _blocks_of(module, shape, part, axis)
                return self._source.read(name, own, blocks, axis)


def _blocks_of(module: str, shape: tuple[int, int], part: slice | None, axis: int) -> slice | None:
    """The blocks of numbers `part` along an axis.

    Raises:
        DividedBlockError: they are no whole blocks.
    """
    first, last, _ = (part or slice(None)).indices(shape[axis])
    # Parts are joined and cut again where a block begins; inputs fill their blocks.
    if first % BLOCK or last % BLOCK or shape[1] % BLOCK:
        raise DividedBlockError(module, first, last)
    return None if part is None else slice(first // BLOCK, last // BLOCK)
