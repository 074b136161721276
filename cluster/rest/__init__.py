"""The OpenAI-compatible HTTP endpoint, over any backend that generates."""

from .api import build_api, build_refusal
from .generation import Backend
from .limits import IngressLimits
from .middleware import read_api_keys

__all__ = ["Backend", "IngressLimits", "build_api", "build_refusal", "read_api_keys"]
