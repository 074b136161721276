"""What a prefill chunk attends to under sparse attention, layer by layer.

Query heads are dealt to the sequence ranks, which exchange what they choose. Every method is
collective over them.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels import sparse
from ...kernels.narrow import Rows
from ...kernels.pages import LayerPages
from ...kernels.sparse import NOTHING, Selections
from ...kernels.transfer import without_waiting
from ..model.layer import Layer
from ..model.qwen2 import Qwen2
from ..stages import Stages
from .sparsity import SparsityConfig


class ChunkSelector:
    """Chooses for one chunk [start, end) of a prompt.

    Args:
        positions: rising, of the rows that this rank holds.
        scale: of the softmax.
    """

    def __init__(
        self,
        model: Qwen2,
        sparsity: SparsityConfig,
        positions: npt.NDArray[np.int64],
        start: int,
        end: int,
        scale: float,
        stages: Stages,
    ) -> None:
        self._model, self._mesh, self._sparsity = model, model.mesh, sparsity
        self._stages, self._scale, self._end = stages, scale, end
        self._num_rows = min(sparsity.last_queries, end - start)
        self._first = end - self._num_rows
        self._held = slice(int(np.searchsorted(positions, self._first)), len(positions))
        places = torch.from_numpy(positions[self._held] - self._first)
        self._places = without_waiting(places, model.device)
        where = torch.arange(self._first, end, device=model.device)
        self._rotations = model.positions.selection_rotations(where, range(self._first, end))

    def last_queries(self, layer: Layer, normed: Rows) -> Tensor:
        """Queries of the chunk's last rows, not rotated, [rows, heads, d] float32.

        They are projected once more here, by whichever ranks hold them: 64 rows cost nothing.

        Args:
            normed: all rows of this rank after the layer's first norm, [n, hidden].
        """
        with self._stages.time("selection"):
            q = layer.queries(normed[self._held]).float()
            if self._mesh.sequence_parallel == 1:
                return q
            last = q.new_zeros(self._num_rows, *q.shape[1:])
            last.index_copy_(0, self._places, q)
        return self._summed(last)

    def choose(self, number: int, last: Tensor, pages: LayerPages) -> Selections:
        """What each head attends to in layer `number`, given its last queries."""
        heads = self._model.heads
        budgets = self._sparsity.heads(number, heads.first_head, heads.last_head)
        ranks, rank = self._mesh.sequence_parallel, self._mesh.sequence_rank
        own = slice(heads.num_heads * rank // ranks, heads.num_heads * (rank + 1) // ranks)
        chosen = None
        if own.start < own.stop:
            with self._stages.time("selection"):
                sums = sparse.sums(
                    self._rotations.rotate(last[:, own]), self._first, pages, own.start,
                    self._model.positions.stride, self._scale,
                    heads.num_heads // heads.num_kv_heads,
                )  # fmt: skip
                chosen = sparse.by_bands(sums, budgets[own])
        if ranks == 1:
            assert chosen is not None
            return chosen
        return self._exchange(chosen, own, sparse.widths_by_bands(budgets, self._end))

    def _exchange(
        self, chosen: Selections | None, own: slice, widths: tuple[int, int]
    ) -> Selections:
        """All heads' selections on every sequence rank, from each rank's heads `own`.

        Each rank fills in its heads and leaves the others 0, so a sum is an exchange.
        """
        heads, device = self._model.heads.num_heads, self._model.device
        every = torch.zeros(heads, sum(widths), dtype=torch.int32, device=device)
        if chosen is not None:
            every[own] = torch.cat(
                [
                    torch.nn.functional.pad(each, (0, width - each.shape[1]), value=NOTHING)
                    for each, width in zip((chosen.columns, chosen.distances), widths, strict=True)
                ],
                1,
            )
        columns, distances = self._summed(every).split(widths, 1)
        return Selections(columns.contiguous(), distances.contiguous())

    def _summed(self, partial: Tensor) -> Tensor:
        with self._stages.time("communication"):
            return self._mesh.sum_over_sequence_ranks(partial)
