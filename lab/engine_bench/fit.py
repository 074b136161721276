"""Whether what is asked for fits in the device's memory."""

from ...engine.kv.pages import PageGeometry
from ...engine.memory.fit import PrefillFit
from ...engine.prefill.sparsity import SparsityConfig
from .work import Work


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
    return PrefillFit(work.weights, geometry, free, chunk_tokens, selects_above=above)
