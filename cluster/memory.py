"""Whether a process of a cluster fits on its GPU, in the settings' words.

Two processes may share a GPU, and what one of them has not taken yet is free to the other. So
sizes are checked before anything is taken, and where memory runs out all the same, that is told
like what was checked.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..engine.kv.pages import PageGeometry
from ..engine.memory.fit import (
    DecodeFit,
    Fit,
    Mends,
    PrefillFit,
    Weights,
    free_bytes,
    out_of_memory_raises,
)
from ..engine.model.config import ModelConfig
from ..engine.model.precision import compute_dtype
from ..engine.prefill.sparsity import SparsityConfig
from .settings import GangSettings, ModelSettings, Settings

_NARROW = "model.kv_cache_dtype fp8_e4m3"
_LARGER = "a larger GPU"


@contextmanager
def room_for_prefill(
    settings: GangSettings, device: torch.device, ranks_on_card: int
) -> Iterator[None]:
    """Where a prefill rank takes what it needs.

    Args:
        ranks_on_card: of its gang, itself among them. All look before they meet, and take nothing
            before they have met, so each sees what all of them have together.

    Raises:
        ConfigurationError: it does not fit on the GPU, or another process had taken too much of it.
    """
    fit = prefill_fit(settings, free_bytes(device), ranks_on_card)
    # No prompt is longer than the limit, however many tokens the pages hold.
    longest = settings.max_prompt_tokens
    with _room(fit, settings.prefill.kv_cache_tokens, longest, device):
        yield


@contextmanager
def room_for_decode(settings: Settings, device: torch.device) -> Iterator[None]:
    """Where a decode worker takes what it needs; as `room_for_prefill`."""
    fit = decode_fit(settings, free_bytes(device))
    with _room(fit, settings.decode.kv_cache_tokens, None, device):
        yield


def prefill_fit(settings: GangSettings, free: int, ranks_on_card: int) -> PrefillFit:
    """One rank's share of the model, of its pages and of a chunk, in so many bytes.

    Raises:
        CheckpointError: the model's configuration or its budgets cannot be read.
        ConfigurationError: the ranks do not divide the model.
    """
    prefill = settings.prefill
    weights, geometry = _model(settings.model, prefill.tensor_parallel)
    chunk, mesh = prefill.key("chunk_tokens"), prefill.key("tensor_parallel")
    others = (f"a smaller {chunk}", f"a larger {mesh}", _LARGER)
    alone = _alone(prefill.key("gpus_per_rank"), prefill.gpus_per_rank)
    mends = Mends(prefill.key("kv_cache_tokens"), _NARROW, others + alone)
    sparsity = SparsityConfig.from_folder(settings.model.folder) if prefill.sparse else None
    return PrefillFit(
        weights, geometry, free, mends, prefill.chunk_tokens, prefill.sequence_parallel,
        selects_above=None if sparsity is None else sparsity.threshold,
        gathers_pages=settings.transport.kind == "object_store",
        sharing=ranks_on_card,
    )  # fmt: skip


def decode_fit(settings: Settings, free: int) -> DecodeFit:
    """A decode worker's model, pages and steps in so many bytes; raises as `prefill_fit`."""
    decode = settings.decode
    weights, geometry = _model(settings.model, 1)
    others = ("a smaller decode.max_batch", _LARGER, *_alone("decode.gpus", decode.gpus))
    mends = Mends("decode.kv_cache_tokens", _NARROW, others)
    chunk_tokens = max(gang.chunk_tokens for gang in settings.prefill)
    return DecodeFit(weights, geometry, free, mends, decode.max_batch, chunk_tokens)


def _model(settings: ModelSettings, tensor_parallel: int) -> tuple[Weights, PageGeometry]:
    config = ModelConfig.from_folder(settings.folder)
    # Sizes are held to on GPUs only.
    dtype = compute_dtype(settings.dtype, torch.device("cuda"))
    weights = Weights(config, dtype.itemsize, tensor_parallel)
    pages = PageGeometry(config.num_layers, weights.heads.num_kv_heads, config.head_dim, dtype)
    return weights, pages.kept_as(settings.pages_kept_as)


def _alone(setting: str, gpus: float) -> tuple[str, ...]:
    """What helps a process that shares its GPU."""
    return () if gpus >= 1 else (f"a GPU of its own ({setting} 1)",)


@contextmanager
def _room(fit: Fit, tokens: int, longest: int | None, device: torch.device) -> Iterator[None]:
    # A host's memory is taken as pages are first used, and its operating system divides it.
    if device.type == "cuda":
        fit.check(tokens, longest)
    with out_of_memory_raises(fit.overrun(tokens, longest)):
        yield
