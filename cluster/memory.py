"""Whether a process of a cluster fits on its GPU, said in the settings' words where it does not.

Two processes may share a GPU, and what one of them has not allocated yet is free to the other. So
sizes are checked before anything is allocated, and where memory runs out all the same, that is said
like what was checked.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..engine.decode.step import NO_PROMPTS, PromptLimits
from ..engine.decode.step_rows import logits_rows
from ..engine.errors import LoadingOutOfMemoryError, LongreachError
from ..engine.kv.pages import PageGeometry
from ..engine.memory.fit import DecodeFit, Fit, PrefillFit, Weights, free_bytes
from ..engine.memory.out_of_memory import out_of_memory_raises
from ..engine.model.compute_type import compute_dtype
from ..engine.model.config import ModelConfig
from ..engine.prefill.sparsity import SparsityConfig
from .remedies import remedied
from .settings import DecodeSettings, GangSettings, ModelSettings, WorkerSettings


@contextmanager
def room_for_prefill(
    settings: GangSettings, device: torch.device, ranks_on_card: int
) -> Iterator[int]:
    """Where a prefill rank allocates what it needs. What it raises names its remedy.

    Yields how many sequence ranks are enough: so many are left at least where others die, or the
    gang cannot go on.

    Args:
        ranks_on_card: of its gang, itself among them. All look before they meet, and allocate
            nothing before they have met, so each sees what all of them have together.

    Raises:
        DoesNotFitError: it would not fit on the GPU.
        LoadingOutOfMemoryError: another process had allocated too much of it.
        LongreachError: as `prefill_fit`, and whatever is raised within.
    """
    # No prompt is longer than the limit, however many tokens the pages hold.
    longest = settings.max_prompt_tokens
    with _remedied(settings.prefill.gpus_per_rank):
        fit = prefill_fit(settings, free_bytes(device), ranks_on_card)
        tokens = settings.prefill.kv_cache_tokens
        with _room(fit, tokens, longest, device):
            yield fit.fewest_sequence_ranks(tokens, longest) if device.type == "cuda" else 1


@contextmanager
def room_for_decode(settings: WorkerSettings, device: torch.device) -> Iterator[None]:
    """Where a decode worker allocates what it needs; as `room_for_prefill`."""
    with _remedied(settings.decode.gpus):
        fit = decode_fit(settings, free_bytes(device))
        with _room(fit, settings.decode.kv_cache_tokens, None, device):
            yield


def prefill_fit(settings: GangSettings, free: int, ranks_on_card: int) -> PrefillFit:
    """One rank's share of the model, of its pages and of a chunk, in so many bytes.

    Raises:
        CheckpointError: the model's configuration or its budgets cannot be read.
        TensorParallelError: the ranks do not divide the model.
    """
    prefill = settings.prefill
    weights, geometry = _model(settings.model, prefill.tensor_parallel)
    sparsity = SparsityConfig.from_folder(settings.model.folder) if prefill.sparse else None
    return PrefillFit(
        weights, geometry, free, prefill.chunk_tokens, prefill.sequence_parallel,
        selects_above=None if sparsity is None else sparsity.threshold,
        gathers_pages=settings.transport.gathers_pages,
        processes=ranks_on_card,
    )  # fmt: skip


def decode_fit(settings: WorkerSettings, free: int) -> DecodeFit:
    """The model, pages and steps of one rank of a decode worker, mostly the only one, in so many
    bytes; raises as `prefill_fit`."""
    weights, geometry = _model(settings.model, settings.decode.tensor_parallel)
    batch, prompts = settings.decode.largest_batch, own_prompts(settings.decode)
    return DecodeFit(
        weights, geometry, free, batch, settings.longest_chunk, logits_rows(batch, prompts),
        prompts.sizes_alone[-1],
    )  # fmt: skip


def own_prompts(decode: DecodeSettings) -> PromptLimits:
    """Which prompts a worker computes itself."""
    if not decode.longest_own_prompt:
        return NO_PROMPTS
    at_once, alone = decode.prompt_tokens_at_once, decode.prompt_tokens_alone
    return PromptLimits(decode.longest_own_prompt, at_once, alone=alone)


def _model(settings: ModelSettings, tensor_parallel: int) -> tuple[Weights, PageGeometry]:
    config = ModelConfig.from_folder(settings.folder)
    # Sizes are held to on GPUs only.
    dtype = compute_dtype(settings.dtype, torch.device("cuda"))
    weights = Weights(config, dtype.itemsize, tensor_parallel, settings.weights)
    pages = PageGeometry(config.num_layers, weights.heads.num_kv_heads, config.head_dim, dtype)
    return weights, pages.kept_as(settings.pages_kept_as)


@contextmanager
def _remedied(gpus: float) -> Iterator[None]:
    """Whoever starts this process may get no more of an error than its words."""
    try:
        yield
    except LongreachError as error:
        remedied(error, gpus)
        raise


@contextmanager
def _room(fit: Fit, tokens: int, longest: int | None, device: torch.device) -> Iterator[None]:
    # A host's memory is taken as pages are first used, and its operating system divides it.
    if device.type == "cuda":
        fit.check(tokens, longest)
    with out_of_memory_raises(LoadingOutOfMemoryError(fit.needs(tokens, longest))):
        yield
