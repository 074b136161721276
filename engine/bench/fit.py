"""Whether what is asked for fits in the device's memory, in the command line's words."""

from ..memory import Mends, PrefillFit
from ..pages import PageGeometry
from .work import Work

_MENDS = Mends(
    "--tokens",
    "--kv-cache fp8",
    ("a smaller --chunk-tokens", "a smaller --shape", "a larger GPU"),
)


def fit(work: Work, geometry: PageGeometry, chunk_tokens: int, free: int) -> PrefillFit:
    """A whole model's prefill; decode takes the same weights and pages, and less besides."""
    return PrefillFit(work.weights, geometry, free, _MENDS, chunk_tokens)
