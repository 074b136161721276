# pyright: reportMissingImports=false
# vLLM is installed in an environment of its own.
"""Whether a vLLM configuration can be served, looked at before anything is loaded."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...engine.model.architectures import SERVED, check_architecture
from ...kernels.page_size import PAGE_TOKENS
from .errors import (
    BackendNotChosenError,
    NoDualChunkError,
    UnsupportedOptionError,
    UntestedVersionError,
)
from .model_attention import DUAL_CHUNK_KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TESTED = ("0.26", "0.32")
"""The minor versions of vLLM that the plugin was tried with: the first and the last it takes."""

BACKEND = "CUSTOM"
_SCHEDULER = "longreach.plugins.vllm.scheduler.make_scheduler"


def check_version(version: str) -> None:
    """Refuse a vLLM whose insides may be others.

    Raises:
        UntestedVersionError: it is neither of `TESTED`, nor between them.
    """
    first, last = (_minor(each) for each in TESTED)
    if not first <= _minor(version) <= last:
        raise UntestedVersionError(version, *TESTED)


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def raw_config(config: "VllmConfig") -> Mapping[str, Any]:
    """The model's `config.json`, with what vLLM put into it."""
    return config.model_config.hf_config.to_dict()


def has_dual_chunks(config: "VllmConfig") -> bool:
    """Whether the model has Dual Chunk Attention."""
    return bool(getattr(config.model_config.hf_config, DUAL_CHUNK_KEY, None))


def chosen_backend(config: "VllmConfig") -> str | None:
    """The name of the attention backend that was asked for."""
    backend = config.attention_config.backend
    return None if backend is None else backend.name


def check(config: "VllmConfig", version: str) -> None:
    """Refuse what cannot be served.

    Raises:
        BackendNotChosenError, NoDualChunkError, UntestedVersionError, UnsupportedOptionError: as
            they say.
        CheckpointError: a kind of attention that is not served.
    """
    model: str = config.model_config.model
    if chosen_backend(config) != BACKEND:
        if has_dual_chunks(config) and config.model_config.architecture in SERVED:
            raise BackendNotChosenError(model)
        return
    if not has_dual_chunks(config):
        raise NoDualChunkError(model)
    check_version(version)
    check_architecture(raw_config(config), model)
    for option, value, instead in _unsupported(config):
        raise UnsupportedOptionError(option, value, instead)


def _unsupported(config: "VllmConfig") -> Iterator[tuple[str, str, str]]:
    """Option, value, and what may be instead."""
    cache, parallel = config.cache_config, config.parallel_config
    own = str(config.model_config.dtype).removeprefix("torch.")
    if cache.cache_dtype not in ("auto", own):
        yield "--kv-cache-dtype", cache.cache_dtype, f"leave it out, or say {own}"
    if cache.user_specified_block_size and cache.block_size % PAGE_TOKENS:
        yield "--block-size", str(cache.block_size), f"leave it out, or say {PAGE_TOKENS}"
    if config.speculative_config is not None:
        yield "--speculative-config", "given", "leave it out"
    if config.model_config.enable_prompt_embeds:
        yield "--enable-prompt-embeds", "given", "leave it out"
    for option, ranks in (
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
    ):
        if ranks > 1:
            yield option, str(ranks), "divide the model by --tensor-parallel-size"
    if parallel.enable_dbo:
        yield "--enable-dbo", "given", "leave it out"
    scheduler = config.scheduler_config.scheduler_cls
    if cache.enable_prefix_caching and scheduler not in (None, _SCHEDULER):
        yield (
            "--enable-prefix-caching",
            "on beside a --scheduler-cls",
            "long prompts' K and V depend on their length, and a scheduler of the plugin's keeps "
            "them apart: leave --scheduler-cls out, or say --no-enable-prefix-caching",
        )


def keep_long_prompts_apart(config: "VllmConfig") -> None:
    """Have vLLM's prefix cache give out no pages of a prompt that is too long for that."""
    if config.cache_config.enable_prefix_caching:
        config.scheduler_config.scheduler_cls = _SCHEDULER


class DualChunkConfig:
    """What vLLM calls for each configuration of a model of a registered architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing: the rest of the configuration is not known yet."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Check it, and take the plugin's scheduler where prompts must be kept apart.

        Raises:
            LongreachError: as `check`.
        """
        from vllm.version import __version__

        check(vllm_config, __version__)
        if chosen_backend(vllm_config) == BACKEND:
            keep_long_prompts_apart(vllm_config)
