"""Whether what is asked for fits in the device's memory, in the command line's words."""

from ...engine.kv.pages import PageGeometry
from ...engine.memory.fit import Mends, PrefillFit
from ...engine.prefill.sparsity import SparsityConfig
from .work import Work

_MENDS = Mends(
    "--tokens",
    "--kv-cache fp8",
    ("a smaller --chunk-tokens", "a smaller --shape", "a larger GPU"),
)


def fit(
    work: Work,
    geometry: PageGeometry,
    chunk_tokens: int,
    free: int,
    sparsity: SparsityConfig | None,
) -> PrefillFit:
    """A whole model's prefill; decode takes the same weights and pages, and less besides.

    Args:
        sparsity: None where no prompt is prefilled sparsely.
    """
    above = None if sparsity is None else sparsity.threshold
    return PrefillFit(work.weights, geometry, free, _MENDS, chunk_tokens, selects_above=above)
