"""The model's own configuration, read from a Hugging Face checkpoint folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError, TensorParallelError
from ..json_files import read_json
from .architectures import check_architecture
from .quantization import Quantization

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""In which type a model computes; `compute_type.compute_dtype` says what "auto" is."""

WeightFormat = Literal["auto", "fp8"]
"""How linear layers' weights are kept: as the checkpoint has them, or rounded to 8 bits."""


@dataclass(frozen=True)
class DualChunk:
    """Dual Chunk Attention (arXiv 2402.17463), as published with Qwen2.5-1M.

    Positions inside a chunk of `stride` tokens are ordinary; `local_size` positions of
    the trained window are kept back so that neighbours across a chunk border stay near.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if not 0 < self.local_size < self.chunk_size:
            raise CheckpointError(
                f"dual_chunk_attention_config: local_size ({self.local_size}) must lie between "
                f"0 and chunk_size ({self.chunk_size})"
            )

    @property
    def stride(self) -> int:
        """Tokens in one chunk (C = S - w in the design)."""
        return self.chunk_size - self.local_size


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a Qwen2 model. Counts are of the whole model, not of one rank's shard."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    dual_chunk: DualChunk | None
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | None = None

    def keeps_narrow(self, module: str, weights: WeightFormat) -> bool:
        """Whether a layer's product of that name, as in a checkpoint, has weights of 8 bits.

        What a quantized checkpoint leaves in more stays so.
        """
        if self.quantization is not None:
            return self.quantization.covers(module)
        return weights == "fp8"

    def check_tensor_parallel(self, ranks: int) -> None:
        """Refuse a number of tensor parallel ranks that this model cannot be cut into.

        Raises:
            TensorParallelError: the heads or the MLP do not divide.
        """
        if not self._divides_by(ranks):
            possible = tuple(n for n in range(1, self.num_heads + 1) if self._divides_by(n))
            raise TensorParallelError(
                ranks, self.num_heads, self.num_kv_heads, self.intermediate_size, possible
            )

    def _divides_by(self, ranks: int) -> bool:
        group = self.num_heads // self.num_kv_heads
        heads = self.num_heads // ranks
        whole = self.num_heads % ranks == 0 and self.intermediate_size % ranks == 0
        return whole and (heads % group == 0 or group % heads == 0)

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `config.json` (and the end tokens of `generation_config.json`).

        Raises:
            CheckpointError: the file is missing, malformed, or of another architecture.
        """
        raw = read_json(folder / "config.json")
        check_architecture(raw, folder)
        try:
            quantization = Quantization.from_config(folder, raw)
            return cls.from_json(raw, _end_tokens(folder, raw), quantization)
        except KeyError as missing:
            raise CheckpointError(f"{folder}/config.json has no key {missing}") from missing

    @classmethod
    def from_json(
        cls,
        raw: Mapping[str, Any],
        eos_token_ids: tuple[int, ...] = (),
        quantization: Quantization | None = None,
    ) -> "ModelConfig":
        """From what `config.json` says.

        Raises:
            KeyError: it does not say enough.
            CheckpointError: what it says does not go together.
        """
        heads = raw["num_attention_heads"]
        kv_heads = raw.get("num_key_value_heads", heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"{heads} query heads cannot be shared evenly by {kv_heads} KV heads"
            )
        dual_chunk = raw.get("dual_chunk_attention_config")
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=_rope_theta(raw),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            max_position_embeddings=raw["max_position_embeddings"],
            dual_chunk=None if dual_chunk is None else _dual_chunk(dual_chunk),
            eos_token_ids=eos_token_ids,
            quantization=quantization,
        )


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """transformers 5 moved `rope_theta` into `rope_parameters`; published checkpoints have both."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"rope_scaling of type {kind!r} is not supported")
    theta = parameters.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise KeyError("rope_theta")
    return float(theta)


def _dual_chunk(raw: Mapping[str, Any]) -> DualChunk:
    return DualChunk(
        chunk_size=raw["chunk_size"],
        local_size=raw["local_size"],
        original_max_position_embeddings=raw["original_max_position_embeddings"],
    )


def _end_tokens(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    source = read_json(generation) if generation.exists() else raw
    tokens = source.get("eos_token_id", raw.get("eos_token_id"))
    if tokens is None:
        return ()
    return tuple(tokens) if isinstance(tokens, list) else (tokens,)
