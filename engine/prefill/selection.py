"""What a prefill chunk attends to under sparse attention, layer by layer.

A selection is made for a *window* of rows, by the last of them. What is computed at once may have
several windows: all are scored, exchanged and chosen for together. Keys are dealt to the sequence
ranks: each sums attention over its own, and says what is heaviest among them. Then heads are dealt:
each rank chooses for some from what all have found, and tells the others.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import sparse
from ...kernels.pages import LayerPages
from ...kernels.sparse import ColumnCandidates, HeadBudget, KeyPart, KeyScores, Selections
from ...kernels.sparse.scores import PartSums
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

        Nothing is scored, or exchanged, where budgets leave no choice: all sequence ranks have the
        same heads.

        Args:
            last: queries of each window's selecting rows, not rotated, [rows, heads, d].
        """
        heads = self._model.heads
        budgets = self._sparsity.heads(number, heads.first_head, heads.last_head)
        lines = [budget for _ in self._windows for budget in budgets]
        if sparse.leave_no_choice(budgets):
            with self._stages.time("selection"):
                keys = self._keys(len(budgets))
                return self._by_window(sparse.what_is_forced(lines, keys, self._model.device))
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
            # Every head attends to its newest band; further ones are chosen by their sums.
            some = any(budget.bands > 1 for budget in budgets)
            sums = [each.sums(lse, bands=some) for each, lse in zip(scored, every, strict=True)]
            firsts = [each.first_key for each in scored]
        if self._mesh.sequence_parallel == 1:
            chosen = self._choose_alone(sums, firsts, budgets, lines)
        else:
            chosen = self._choose_together(sums, firsts, lines)
        return self._by_window(chosen)

    def _by_window(self, chosen: Selections) -> list[Selections]:
        """Lines of all windows, heads of one after another, cut."""
        heads = self._model.heads.num_heads
        parts = [slice(start, start + heads) for start in range(0, len(chosen.columns), heads)]
        return [Selections(chosen.columns[part], chosen.distances[part]) for part in parts]

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

    def _choose_alone(
        self,
        sums: Sequence[PartSums],
        firsts: Sequence[int],
        budgets: list[HeadBudget],
        lines: list[HeadBudget],
    ) -> Selections:
        """From sums of all keys."""
        with self._stages.time("selection"):
            found = [
                sparse.column_candidates(part.columns, first, budgets)
                for part, first in zip(sums, firsts, strict=True)
            ]
            return sparse.choose_by_bands(
                _joined(found), _joined_bands(sums), lines, self._keys(len(budgets))
            )

    def _choose_together(
        self, sums: Sequence[PartSums], firsts: Sequence[int], lines: list[HeadBudget]
    ) -> Selections:
        """From each rank's sums over its keys. Lines are dealt: each rank chooses for some.

        So a rank is sent what it chooses from, and not what all choose from.
        """
        mesh, most = self._mesh, max(sparse.free_counts(lines))
        with self._stages.time("selection"):
            found = _joined(
                [
                    sparse.part_candidates(part.columns, first, most)
                    for part, first in zip(sums, firsts, strict=True)
                ]
            )
            bands = _joined_bands(sums)
            # What they differ in is one tensor on its way.
            sent = torch.cat((bands, found.weights, found.places.view(torch.float32)), 1)
            share = -(-len(lines) // mesh.sequence_parallel)
            missing = share * mesh.sequence_parallel - len(lines)
            sent = torch.nn.functional.pad(sent, (0, 0, 0, missing))
        with self._stages.time("communication"):
            received = mesh.exchange_over_sequence_ranks(
                sent.view(mesh.sequence_parallel, share, -1)
            )
        with self._stages.time("selection"):
            own = slice(mesh.sequence_rank * share, (mesh.sequence_rank + 1) * share)
            # Lines beyond the last are chosen for like the last, and left out.
            budgets = [*lines, *lines[-1:] * missing][own]
            keys = self._keys(len(lines) // len(self._windows))
            keys = [*keys, *keys[-1:] * missing][own]
            weights, places = received[..., bands.shape[1] :].split(most, 2)
            together = sparse.heaviest(
                weights, places.view(torch.int32), sparse.free_counts(budgets)
            ).filled_up(most)
            summed = received[..., : bands.shape[1]].sum(0)
            chosen = sparse.choose_by_bands(together, summed, budgets, keys)
            width = chosen.columns.shape[1]
            tiles = sparse.band_tiles(lines, bands.shape[1])
            distances = _wide(chosen.distances, tiles, sparse.NOTHING)
            chosen = torch.cat((chosen.columns, distances), 1)
        with self._stages.time("communication"):
            every = mesh.gather_over_sequence_ranks(chosen).flatten(0, 1)[: len(lines)]
        with self._stages.time("selection"):
            end = self._windows[-1].end
            return Selections.received(every[:, :width], every[:, width:], end)

    def _keys(self, heads: int) -> list[int]:
        """How many keys each line looks at: heads of one window after another."""
        return [window.end for window in self._windows for _ in range(heads)]


def _joined(found: Sequence[ColumnCandidates]) -> ColumnCandidates:
    if len(found) == 1:
        return found[0]
    return ColumnCandidates(
        torch.cat([each.weights for each in found]), torch.cat([each.places for each in found])
    )


def _joined_bands(sums: Sequence[PartSums]) -> Tensor:
    """[lines, most bands]; 0 beyond a line's own."""
    most = max(part.bands.shape[1] for part in sums)
    return torch.cat([_wide(part.bands, most, 0.0) for part in sums])


def _rotations(model: Qwen2, rows: range) -> Rotations:
    where = torch.arange(rows.start, rows.stop, device=model.device)
    return model.positions.selection_rotations(where, rows)


def _most_rows(parts: Sequence[Tensor]) -> int:
    return max(part.shape[2] for part in parts)


def _wide(values: Tensor, count: int, value: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, count - values.shape[1]), value=value)
