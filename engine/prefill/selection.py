"""What a prefill chunk attends to under sparse attention, layer by layer.

A selection is made for a *window* of rows, by the last of them. What is computed at once may have
several windows: all are scored, exchanged and chosen for together. Keys are dealt to the sequence
ranks: each sums attention over its own, and says what is heaviest among them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import sparse
from ...kernels.pages import LayerPages
from ...kernels.sparse import ColumnCandidates, HeadBudget, KeyPart, KeyScores, Selections
from ..model.positions import Rotations
from ..model.qwen2 import Qwen2
from ..stages import Stages
from .sparsity import SparsityConfig


@dataclass(frozen=True)
class Window:
    """Rows [start, end) of a prompt that have one selection; its last ones `select`."""

    start: int
    end: int
    select: range

    @classmethod
    def cut(cls, start: int, end: int, sparsity: SparsityConfig) -> "tuple[Window, ...]":
        """Those of a chunk [start, end): borders lie where they do for every chunk size."""
        size = sparsity.window_tokens
        borders = [start, *range((start // size + 1) * size, end, size), end]
        return tuple(
            cls(first, last, range(max(first, last - sparsity.last_queries), last))
            for first, last in itertools.pairwise(borders)
        )


class ChunkSelector:
    """Chooses for the windows of one chunk.

    Args:
        scale: of the softmax.
    """

    def __init__(
        self,
        model: Qwen2,
        sparsity: SparsityConfig,
        windows: Sequence[Window],
        scale: float,
        stages: Stages,
    ) -> None:
        self._model, self._mesh, self._sparsity = model, model.mesh, sparsity
        self._windows, self._scale, self._stages = windows, scale, stages
        self._part = KeyPart(self._mesh.sequence_rank, self._mesh.sequence_parallel)
        self._rotations = [_rotations(model, window.select) for window in windows]

    def choose(self, number: int, last: Sequence[Tensor], pages: LayerPages) -> list[Selections]:
        """What each head attends to in layer `number`, for each window; collective.

        Args:
            last: queries of each window's selecting rows, not rotated, [rows, heads, d].
        """
        heads = self._model.heads
        budgets = self._sparsity.heads(number, heads.first_head, heads.last_head)
        with self._stages.time("selection"):
            scored = [
                self._score(window, rotations, queries, pages)
                for window, rotations, queries in zip(
                    self._windows, self._rotations, last, strict=True
                )
            ]
            own = [each.log_sum_exps() for each in scored]
        every = self._exchanged_log_sum_exps(scored, own)
        with self._stages.time("selection"):
            candidates, bands = self._sum(scored, every, budgets)
        candidates, bands = self._exchanged_sums(candidates, bands, budgets)
        with self._stages.time("selection"):
            count, size = len(self._windows), len(budgets)
            keys = [window.end for window in self._windows for _ in budgets]
            chosen = sparse.choose_by_bands(candidates, bands, budgets * count, keys)
            lines = [slice(first, first + size) for first in range(0, count * size, size)]
            return [Selections(chosen.columns[own], chosen.distances[own]) for own in lines]

    def _score(
        self, window: Window, rotations: Rotations, queries: Tensor, pages: LayerPages
    ) -> KeyScores:
        heads = self._model.heads
        return sparse.key_scores(
            rotations.rotate(queries.float()), window.select.start, pages, 0,
            self._model.positions.stride, self._scale, heads.num_heads // heads.num_kv_heads,
            self._part,
        )  # fmt: skip

    def _exchanged_log_sum_exps(
        self, scored: Sequence[KeyScores], own: list[Tensor]
    ) -> list[Tensor]:
        """Of all keys' stretches, for each window."""
        if self._mesh.sequence_parallel == 1:
            return own
        with self._stages.time("communication"):
            most = [max(each.counts()) for each in scored]
            sent = own[0].new_full((len(own[0]), sum(most), _most_rows(own)), -torch.inf)
            firsts = [sum(most[:window]) for window in range(len(most))]
            for first, part in zip(firsts, own, strict=True):
                sent[:, first : first + part.shape[1], : part.shape[2]] = part
            gathered = self._mesh.gather_over_sequence_ranks(sent)
            return [
                sparse.in_order(gathered[..., : part.shape[2]], each.counts(), first)
                for first, part, each in zip(firsts, own, scored, strict=True)
            ]

    def _sum(
        self, scored: Sequence[KeyScores], every: Sequence[Tensor], budgets: list[HeadBudget]
    ) -> tuple[ColumnCandidates, Tensor]:
        """This rank's part of the sums of all windows' heads, one window after another."""
        sums = [each.sums(lse) for each, lse in zip(scored, every, strict=True)]
        found = [
            sparse.column_candidates(part.columns, each.first_key, budgets)
            for each, part in zip(scored, sums, strict=True)
        ]
        if len(sums) == 1:
            return found[0], sums[0].bands
        bands = [_wide(part.bands, max(part.bands.shape[1] for part in sums)) for part in sums]
        return (
            ColumnCandidates(
                torch.cat([each.weights for each in found]),
                torch.cat([each.places for each in found]),
            ),
            torch.cat(bands),
        )

    def _exchanged_sums(
        self, candidates: ColumnCandidates, bands: Tensor, budgets: list[HeadBudget]
    ) -> tuple[ColumnCandidates, Tensor]:
        """Those of all keys, from each rank's. What they differ in is one tensor on its way."""
        ranks = self._mesh.sequence_parallel
        if ranks == 1:
            return candidates, bands
        with self._stages.time("communication"):
            places = candidates.places.view(torch.float32)
            sent = torch.cat((bands, candidates.weights, places), 1)
            gathered = self._mesh.gather_over_sequence_ranks(sent)
        with self._stages.time("selection"):
            most, width = candidates.weights.shape[1], bands.shape[1]
            weights, places = gathered[..., width:].split(most, 2)  # [ranks, lines, most]
            counts = sparse.free_counts(budgets) * len(self._windows)
            together = sparse.heaviest(weights, places.view(torch.int32), counts)
            return together, gathered[..., :width].sum(0)


def _rotations(model: Qwen2, rows: range) -> Rotations:
    where = torch.arange(rows.start, rows.stop, device=model.device)
    return model.positions.selection_rotations(where, rows)


def _most_rows(parts: Sequence[Tensor]) -> int:
    return max(part.shape[2] for part in parts)


def _wide(bands: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(bands, (0, count - bands.shape[1]))
