"""The OpenAI-compatible HTTP endpoint, over any backend that generates."""

from .api import build_api, build_refusal
from .generation import Backend
from .limits import Access, IngressLimits, SignsOfLife
from .middleware import read_api_keys

__all__ = [
    "Access",
    "Backend",
    "IngressLimits",
    "SignsOfLife",
    "build_api",
    "build_refusal",
    "read_api_keys",
]
