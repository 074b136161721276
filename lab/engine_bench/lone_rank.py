"""One rank of a mesh that is not there: its own work, without the others'."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ...engine.model.heads import RankHeads
from ...engine.parallel.aside import Pending
from ...engine.parallel.mesh import Mesh
from ...kernels.sparse import Selections


@dataclass(frozen=True)
class LoneRank(Mesh):
    """Computes what a rank computes; collectives return at once with something of the right size.

    What other ranks would have sent is the rank's own part again. But what they would have selected
    decides how much this one attends to, so a prefiller is given that: see `Planted`.
    """

    def begin_sum_over_tensor_ranks(self, partial: Tensor) -> Pending[Tensor]:
        """The own part."""
        return Pending(partial)

    def begin_sum_over_sequence_ranks(self, partial: Tensor) -> Pending[Tensor]:
        """The own part."""
        return Pending(partial)

    def gather_over_tensor_ranks(self, part: Tensor) -> Tensor:
        """The own part from every rank."""
        return part.expand(self.tensor_parallel, *part.shape)

    def exchange_over_sequence_ranks(self, parts: Tensor) -> Tensor:
        """The own part from every rank."""
        return parts[self.sequence_rank].expand_as(parts)

    def begin_gather_over_sequence_ranks(
        self,
        part: Tensor,
        into: Tensor | None = None,
        then: Callable[[Tensor], None] | None = None,
    ) -> Pending[Tensor]:
        """The own part from every rank."""
        gathered = part.expand(self.sequence_parallel, *part.shape)
        if into is not None:
            into.view(self.sequence_parallel, *part.shape).copy_(gathered)
            gathered = into
        if then is not None:
            then(gathered)
        return Pending(gathered)


@dataclass
class Recorded:
    """What every layer of a chunk selects, of all heads, taken over in turn by a rank's heads."""

    heads: RankHeads
    layers: deque[list[Selections]] = field(default_factory=deque)

    def record(self, layers: Sequence[list[Selections]]) -> None:
        """Those of the next chunk, by layer and window."""
        self.layers = deque(layers)

    def plant(self, own: list[Selections]) -> list[Selections]:
        """In place of what a lone rank would select; its own where nothing was recorded."""
        if not self.layers:
            return own
        every = self.layers[0]
        self.layers.rotate(-1)
        held = slice(self.heads.first_head, self.heads.last_head)
        return [Selections(each.columns[held], each.distances[held]) for each in every]
