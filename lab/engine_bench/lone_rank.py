"""One rank of a mesh that is not there: its own work, without the others'."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...engine.model.heads import RankHeads
from ...engine.parallel.mesh import Mesh
from ...engine.prefill.sparsity import SparsityConfig
from ...kernels import sparse
from ...kernels.sparse import NOTHING, Selections


@dataclass(frozen=True)
class LoneRank(Mesh):
    """Computes what a rank computes; collectives return at once with something of the right size.

    What other ranks would have sent is the rank's own part again, with one exception: what other
    ranks select decides how much this one attends to. Their selections come from `exchanged`, one
    for each layer in turn, as the exchange of a real mesh would leave them.
    """

    exchanged: deque[Tensor] = field(default_factory=deque)

    def sum_over_tensor_ranks(self, partial: Tensor) -> Tensor:
        """The own part."""
        return partial

    def sum_over_sequence_ranks(self, partial: Tensor) -> Tensor:
        """The own part; of selections, which alone are whole numbers, those of all heads."""
        if partial.dtype != torch.int32 or not self.exchanged:
            return partial
        whole = self.exchanged[0]
        self.exchanged.rotate(-1)
        return partial.copy_(whole)

    def gather_over_sequence_ranks(self, rows: Tensor) -> Tensor:
        """The own part from every rank."""
        return rows.expand(self.sequence_parallel, *rows.shape)


def exchanged(
    recorded: Sequence[Selections], held: RankHeads, sparsity: SparsityConfig, keys: int
) -> deque[Tensor]:
    """What a rank's exchange ends with in each layer, from selections of all heads."""
    heads = slice(held.first_head, held.last_head)
    result: deque[Tensor] = deque()
    for layer, selections in enumerate(recorded):
        budgets = sparsity.heads(layer, held.first_head, held.last_head)
        widths = sparse.widths_by_bands(budgets, keys)
        lists = (selections.columns[heads], selections.distances[heads])
        parts = [
            pad(each[:, :width], (0, max(0, width - each.shape[1])), value=NOTHING)
            for each, width in zip(lists, widths, strict=True)
        ]
        result.append(torch.cat(parts, 1))
    return result
