"""Which part of the vocabulary a tensor rank holds, in the embedding and in the head."""

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..parallel.mesh import Mesh


@dataclass(frozen=True)
class VocabularyPart:
    """Tokens [first, first + size) of `total`; the last part may reach beyond them, by rows of 0.

    All parts have as many rows, so that logits can be gathered.
    """

    first: int
    size: int
    total: int

    @classmethod
    def of(cls, total: int, mesh: Mesh) -> "VocabularyPart":
        """This rank's."""
        size = -(-total // mesh.tensor_parallel)
        return cls(mesh.tensor_rank * size, size, total)

    @property
    def rows(self) -> slice | None:
        """Those that exist; None where they are all."""
        if self.size == self.total:
            return None
        return slice(min(self.first, self.total), min(self.first + self.size, self.total))

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Rows of this rank's part of the embedding, [n, hidden]: 0 for other ranks' tokens."""
        if self.size == self.total:
            return functional.embedding(tokens, table)
        own = tokens - self.first
        outside = (own < 0) | (own >= self.size)
        rows = functional.embedding(own.masked_fill(outside, 0), table)
        return rows.masked_fill_(outside[:, None], 0.0)

    def joined(self, parts: Tensor) -> Tensor:
        """All ranks' logits, [parts, n, size], to [n, total]."""
        return torch.cat(parts.unbind(0), 1)[:, : self.total].contiguous()
