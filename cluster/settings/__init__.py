"""A cluster's configuration: YAML in, checked and frozen settings out.

Every key has a default but `model.path`, `model.name`, `limits.max_model_len` and the two
`kv_cache_tokens`. What cannot run is refused before anything starts, with a sentence that names the
remedy: by a section itself (`sections`), by what sections must agree in (`problems`), or by the
checkpoint (`of_a_model`).
"""

from .of_a_model import check_decode_ranks, check_model, load_settings, warnings_about
from .parts import GangSettings, HandOffTerms, WorkerSettings
from .reading import Settings, parse_settings, read_settings
from .sections import (
    AutoscalingSettings,
    DecodeSettings,
    IngressSettings,
    LimitSettings,
    ModelSettings,
    NodeLabels,
    PrefillSettings,
    TransportSettings,
)

__all__ = [
    "AutoscalingSettings",
    "DecodeSettings",
    "GangSettings",
    "HandOffTerms",
    "IngressSettings",
    "LimitSettings",
    "ModelSettings",
    "NodeLabels",
    "PrefillSettings",
    "Settings",
    "TransportSettings",
    "WorkerSettings",
    "check_decode_ranks",
    "check_model",
    "load_settings",
    "parse_settings",
    "read_settings",
    "warnings_about",
]
