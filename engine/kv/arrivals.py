"""Which pages of a prompt have arrived, so that nobody computes them a second time."""

import numpy as np

from ...kernels.page_size import PAGE_TOKENS
from .hand_off import Place
from .pages import PageGeometry


class Arrivals:
    """Notes pages by layer, page and KV head; those that come again change nothing.

    Args:
        geometry: of all pages, with all KV heads.
        num_pages: of the prompt.
    """

    def __init__(self, geometry: PageGeometry, num_pages: int) -> None:
        # 1 MB for a million tokens of 28 layers and 4 heads.
        self._are_here = np.zeros(
            (geometry.num_layers, num_pages, geometry.num_kv_heads), dtype=np.bool_
        )

    def note(self, place: Place, num_pages: int, num_kv_heads: int) -> None:
        """So many pages have arrived at a place, of so many KV heads."""
        pages = slice(place.first_page, place.first_page + num_pages)
        heads = slice(place.first_kv_head, place.first_kv_head + num_kv_heads)
        self._are_here[place.layer, pages, heads] = True

    @property
    def complete_tokens(self) -> int:
        """Tokens from the prompt's beginning on whose pages are here, in all layers and heads.

        Counted in whole pages: more than the prompt has where all are here.
        """
        missing = np.flatnonzero(~np.all(self._are_here, axis=(0, 2)))
        return PAGE_TOKENS * int(missing[0] if len(missing) else self._are_here.shape[1])
