"""A checkpoint in this process, under one or several kinds of positions and prefill."""

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import torch

from ...engine.decode.decoder import Decoder
from ...engine.decode.detokenizer import TokenBytes
from ...engine.errors import (
    ConfigurationError,
    GenerationError,
    OutOfMemoryError,
    ReceiveOutOfMemoryError,
)
from ...engine.kv.formats import KVCacheDtype, dtype_name
from ...engine.kv.pages import PagePool
from ...engine.local import DirectHandOff
from ...engine.memory.out_of_memory import out_of_memory_raises
from ...engine.messages import Delta, GenerationRequest, Progress, SamplingParameters, Tokens
from ...engine.model.config import DualChunk, WeightFormat
from ...engine.model.qwen2 import Qwen2
from ...engine.parallel.mesh import Mesh
from ...engine.prefill.prefiller import Prefiller
from ...engine.prefill.sparsity import SparsityConfig
from ...engine.text.tokenizer import Tokenizer
from ...kernels.page_size import pages_for
from .answerer import Answer, Answerer, OnProgress, TokenCount

_REQUEST = "evaluation"
CHUNK_TOKENS = 32768
_HASHED_BYTES = 1 << 20
_SHORTER = "take shorter --lengths"


class Variant(StrEnum):
    """Dense Dual Chunk Attention with its temperature, the same without one or without dual
    chunks, sparse prefill with both, and dense attention over KV pages of 8 bits, with weights
    of 8 bits, and with both.
    """

    DENSE = "dense"
    NO_TEMPERATURE = "no-temperature"
    PLAIN = "plain"
    SPARSE = "sparse"
    FP8 = "fp8"
    FP8_WEIGHTS = "fp8-weights"
    FP8_BOTH = "fp8-both"


@dataclass(frozen=True)
class _Engine:
    prefiller: Prefiller
    decoder: Decoder


class InProcessAnswerer(Answerer):
    """Greedy answers of a checkpoint. Not thread-safe.

    Args:
        folder: the checkpoint.
        variants: which of them are wanted.
        max_tokens: of a prompt and its answer.

    Raises:
        CheckpointError: no checkpoint that can be served.
        ConfigurationError: a variant that this checkpoint does not have.
    """

    def __init__(
        self,
        folder: Path,
        variants: Sequence[Variant],
        max_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self._folder, self._variants = folder, tuple(variants)
        self._device = device or torch.device("cpu")
        self._dtype, self._chunk_tokens = dtype, chunk_tokens
        self._tokenizer = Tokenizer(folder)
        formats_of_weights: set[WeightFormat] = {_weights(variant) for variant in variants}
        models = {
            kept: Qwen2.load(folder, Mesh.single(), dtype, self._device, kept).with_tokens(
                self._tokenizer.vocab_size
            )
            for kept in formats_of_weights
        }
        geometry = next(iter(models.values())).page_geometry
        # One prompt at a time, so that all variants share the pages on either side.
        formats: set[KVCacheDtype] = {_kv_cache_dtype(variant) for variant in variants}
        pools = {
            name: [
                PagePool(geometry.kept_as(name), pages_for(max_tokens), self._device)
                for _ in range(2)
            ]
            for name in formats
        }
        token_bytes = TokenBytes(self._tokenizer.raw)
        self._engines = {}
        for variant in variants:
            model = models[_weights(variant)]
            changed = model.with_dual_chunk(_dual_chunk(folder, model.config.dual_chunk, variant))
            sparsity = sparsity_of(folder) if variant is Variant.SPARSE else None
            prefill_pool, decode_pool = pools[_kv_cache_dtype(variant)]
            self._engines[variant] = _Engine(
                Prefiller(changed, prefill_pool, sparsity),
                Decoder(changed, decode_pool, token_bytes, max_batch=1),
            )

    @property
    def model(self) -> str:
        return name_of(self._folder)

    @property
    def variants(self) -> Sequence[str]:
        return self._variants

    @property
    def settings(self) -> Mapping[str, str]:
        return {
            "checkpoint": fingerprint(self._folder),
            "dtype": dtype_name(self._dtype),
            "device": self._device.type,
            "chunk_tokens": str(self._chunk_tokens),
        }

    def counter(self, sample: str) -> TokenCount:
        return lambda content: len(self.encode(content))

    def encode(self, content: str) -> Tokens:
        """The prompt of a chat in which a user says `content`."""
        return self._tokenizer.encode_chat([{"role": "user", "content": content}])

    def answer(
        self, variant: str, content: str, max_tokens: int, on_progress: OnProgress
    ) -> Answer:
        engine, prompt = self._engines[Variant(variant)], self.encode(content)
        sampling = SamplingParameters(max_tokens, temperature=0.0)
        ran_out = OutOfMemoryError(f"the device ran out of memory at {len(prompt):,} tokens")
        engine.decoder.reserve(GenerationRequest(_REQUEST, prompt, sampling, time.time()))
        try:
            with out_of_memory_raises(ran_out.with_remedy(_SHORTER)):
                return Answer(self._generate(engine, prompt, on_progress), len(prompt))
        except ReceiveOutOfMemoryError as error:
            error.with_remedy(_SHORTER)
            raise
        finally:
            engine.decoder.cancel(_REQUEST)

    def _generate(self, engine: _Engine, prompt: Tokens, on_progress: OnProgress) -> str:
        prefiller, decoder = engine.prefiller, engine.decoder
        sender = DirectHandOff(decoder, _REQUEST)
        prefiller.admit(_REQUEST, prompt)
        try:
            logits = None
            for start in range(0, len(prompt), self._chunk_tokens):
                end = min(start + self._chunk_tokens, len(prompt))
                logits = prefiller.run_chunk(_REQUEST, start, end, sender).logits
                on_progress(Progress(end, len(prompt)))
        finally:
            prefiller.release(_REQUEST)
        assert logits is not None
        outputs = decoder.start(_REQUEST, logits.cpu().numpy())
        while decoder.has_work:
            outputs += decoder.step()
        for _, output in outputs:
            if isinstance(output, GenerationError):
                raise output
        return "".join(delta.text for _, delta in outputs if isinstance(delta, Delta))


def name_of(folder: Path) -> str:
    """What results call a checkpoint: the last two parts of its path."""
    return "/".join(folder.resolve().parts[-2:])


def fingerprint(folder: Path) -> str:
    """A short name for what a checkpoint says.

    Its JSON files count as a whole, of its weights the sizes and the first and last mebibyte:
    reading all of a large model would take longer than asking it.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]):
        digest.update(path.name.encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HASHED_BYTES))
            file.seek(max(0, size - _HASHED_BYTES))
            digest.update(file.read(_HASHED_BYTES))
    return digest.hexdigest()[:16]


def _kv_cache_dtype(variant: Variant) -> KVCacheDtype:
    return "fp8_e4m3" if variant in (Variant.FP8, Variant.FP8_BOTH) else "auto"


def _weights(variant: Variant) -> WeightFormat:
    return "fp8" if variant in (Variant.FP8_WEIGHTS, Variant.FP8_BOTH) else "auto"


def _dual_chunk(folder: Path, own: DualChunk | None, variant: Variant) -> DualChunk | None:
    if own is None and variant in (Variant.NO_TEMPERATURE, Variant.PLAIN):
        raise ConfigurationError(
            f"{folder} has no dual chunks, so that its variant dense is plain already; "
            f"leave {variant} out"
        )
    if own is None or variant is Variant.PLAIN:
        return None
    if variant is Variant.NO_TEMPERATURE:
        # The temperature is 1 up to the length that was trained on.
        return replace(own, original_max_position_embeddings=sys.maxsize)
    return own


def sparsity_of(folder: Path) -> SparsityConfig:
    """The budgets of a checkpoint.

    Raises:
        ConfigurationError: it has none.
    """
    sparsity = SparsityConfig.from_folder(folder)
    if sparsity is None:
        raise ConfigurationError(
            f"{folder} has no sparse_attention_config.json; make one with `longreach eval "
            "calibrate`, or leave the variant sparse out"
        )
    return sparsity
