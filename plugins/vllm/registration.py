# pyright: reportMissingImports=false
# vLLM is installed in an environment of its own.
"""What the plugin puts into vLLM: a backend, a model, what checks its configuration, and, on CPUs,
a way for the backend to be chosen.
"""

from functools import wraps
from typing import Any

from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from ...engine.model.architectures import SERVED
from .checks import DualChunkConfig
from .replacing import Function, replace_once

_BACKEND = "longreach.plugins.vllm.backend.DualChunkBackend"
_MODELS = {"Qwen2ForCausalLM": "longreach.plugins.vllm.model:LongQwen2ForCausalLM"}
_REFUSED = ("Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
"""They may have Dual Chunk Attention too, and are looked at before vLLM fails to load them."""
_CHOOSES = "get_attn_backend_cls"


def register() -> None:
    """Put them there. May be called again: vLLM does so itself, and so does a decode worker."""
    register_backend(AttentionBackendEnum.CUSTOM, _BACKEND)
    for architecture in SERVED:
        ModelRegistry.register_model(architecture, _MODELS[architecture])
        MODELS_CONFIG_MAP[architecture] = DualChunkConfig
    for architecture in _REFUSED:
        MODELS_CONFIG_MAP.setdefault(architecture, DualChunkConfig)
    if current_platform.is_cpu():
        _let_cpus_choose(type(current_platform))


def _let_cpus_choose(platform: type) -> None:
    """vLLM knows one backend for CPUs, whatever is asked for; this one is asked for by name."""
    replace_once(platform, _CHOOSES, _choosing_ours)


def _choosing_ours(original: Function) -> Function:
    @wraps(original)
    def choose(selected: Any, *args: Any, **kwargs: Any) -> str:
        if selected is AttentionBackendEnum.CUSTOM:
            return AttentionBackendEnum.CUSTOM.get_path()
        return original(selected, *args, **kwargs)

    return choose
