"""Queries of a few rows of a chunk that every sequence rank needs, whichever of them holds them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels.narrow import Rows
from ...kernels.transfer import without_waiting
from ..model.layer import Layer
from ..model.qwen2 import Qwen2
from ..parallel.aside import Pending


class SharedRows:
    """Those at some positions of a prompt.

    Args:
        held: positions of the rows that this rank holds, rising.
        wanted: positions that lie in the chunk; ranges may overlap.
    """

    def __init__(self, model: Qwen2, held: npt.NDArray[np.int64], wanted: Sequence[range]) -> None:
        self._model = model
        self._positions = np.unique(np.concatenate([np.array(each, np.int64) for each in wanted]))
        own = np.flatnonzero(np.isin(self._positions, held))
        rows = np.searchsorted(held, self._positions[own])
        self._held_here = len(own)
        self._rows, self._places = (
            without_waiting(torch.from_numpy(each), model.device) for each in (rows, own)
        )

    def begin(self, layer: Layer, normed: Rows) -> Pending[Tensor]:
        """Their queries, not rotated, [rows, heads, d], beside computing; collective.

        They are projected once more here, by whichever ranks hold them: so few rows cost nothing.

        Args:
            normed: all rows of this rank after the layer's first norm, [n, hidden].
        """
        if self._model.mesh.sequence_parallel == 1:
            return Pending(layer.queries(normed[self._rows]))
        every = torch.zeros(
            len(self._positions), self._model.heads.num_heads, self._model.config.head_dim,
            dtype=self._model.dtype, device=self._model.device,
        )  # fmt: skip
        if self._held_here:
            every.index_copy_(0, self._places, layer.queries(normed[self._rows]))
        # Each row is 0 on every rank but one, so a sum is an exchange.
        return self._model.mesh.begin_sum_over_sequence_ranks(every)

    def places(self, positions: range) -> slice:
        """Where one of the wanted ranges lies among all of them."""
        first, last = np.searchsorted(self._positions, (positions.start, positions.stop))
        return slice(int(first), int(last))
