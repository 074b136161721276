"""From sums of attention to what is attended to: vertical-slash selection and its variants.

All work on any device, on all heads at once. Whatever is chosen ends as whole columns and whole
tiles, since attention computes tiles: a lone diagonal costs as much as 128 neighbours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dual_chunk.segments import BLOCK_ROWS
from .heaviest import ColumnCandidates, heaviest, heaviest_in_no_order, on_device
from .selections import NOTHING, HeadBudget, Selections, Sums, round_up

FORCED_VERTICALS = 30
"""The first tokens of a sequence are always attended to: attention sinks."""

FORCED_SLASHES = 100
"""The nearest diagonals are always attended to."""


def by_bands(sums: Sums, budgets: Sequence[HeadBudget]) -> Selections:
    """The heaviest columns, and the heaviest bands of 128 diagonals, as many as budgets allow.

    A budget of s slashes buys ceil(s / 128) bands. The nearest band is always taken.
    """
    columns = sums.columns
    candidates = column_candidates(columns, 0, budgets)
    return choose_by_bands(candidates, sums.bands, budgets, [columns.shape[1]] * len(columns))


def column_candidates(
    columns: Tensor, first_key: int, budgets: Sequence[HeadBudget]
) -> ColumnCandidates:
    """The heaviest of keys [first_key, first_key + n), as many as each line may take.

    Without those that are taken anyway.

    Args:
        columns: sums of attention, [lines, n].
    """
    skipped = _forced_before(columns, first_key)
    return heaviest(columns[:, skipped:], first_key + skipped, free_counts(budgets))


def part_candidates(columns: Tensor, first_key: int, most: int) -> ColumnCandidates:
    """Of a part of the keys, what `column_candidates` of all may be, `most` for every line.

    In no order: whoever joins the parts chooses among them anew, by `heaviest`.
    """
    skipped = _forced_before(columns, first_key)
    return heaviest_in_no_order(columns[:, skipped:], first_key + skipped, most)


def _forced_before(columns: Tensor, first_key: int) -> int:
    """How many of the first columns are taken anyway."""
    return min(max(FORCED_VERTICALS - first_key, 0), columns.shape[1])


def free_counts(budgets: Sequence[HeadBudget]) -> list[int]:
    """Columns that each head may take beside the forced ones."""
    return [max(0, budget.verticals - FORCED_VERTICALS) for budget in budgets]


def choose_by_bands(
    candidates: ColumnCandidates,
    bands: Tensor,
    budgets: Sequence[HeadBudget],
    keys: Sequence[int],
) -> Selections:
    """As `by_bands`, from the heaviest columns of all keys.

    Args:
        candidates: as many as each line may take, beside the forced ones.
        bands: float32 [lines, most bands]; 0 beyond a line's own.
        keys: how many each line looks at.
    """
    chosen = _heaviest(bands, [budget.bands for budget in budgets], 1)
    touched = _marks(chosen, bands.shape[1]) | _marks(chosen + 1, bands.shape[1])
    return Selections(
        _with_forced_columns(candidates.places, keys), _rising(touched, 2 * chosen.shape[1])
    )


def leave_no_choice(budgets: Sequence[HeadBudget]) -> bool:
    """Whether they allow no more than what is always attended to, whatever the sums are."""
    return all(each.verticals <= FORCED_VERTICALS and each.bands == 1 for each in budgets)


def what_is_forced(
    budgets: Sequence[HeadBudget], keys: Sequence[int], device: torch.device
) -> Selections:
    """What `by_bands` chooses for budgets that leave no choice: without any sums.

    Args:
        keys: how many each line looks at.
    """
    lines = len(budgets)
    nothing = ColumnCandidates(
        torch.empty(lines, 0, device=device),
        torch.empty(lines, 0, dtype=torch.int32, device=device),
    )
    bands = torch.zeros(lines, -(-max(keys) // BLOCK_ROWS), device=device)
    return choose_by_bands(nothing, bands, budgets, keys)


def band_tiles(budgets: Sequence[HeadBudget], bands: int) -> int:
    """Tiles that `choose_by_bands` takes at most, of so many bands: two for each that is chosen."""
    return min(2 * max(1, *(budget.bands for budget in budgets)), bands)


def _with_forced_columns(places: Tensor, keys: Sequence[int]) -> Tensor:
    """The first tokens of each line, and what was chosen of the rest, filled up to whole tiles."""
    forced = torch.arange(FORCED_VERTICALS, dtype=torch.int32, device=places.device)
    lines = forced.expand(len(places), -1)
    if min(keys) < FORCED_VERTICALS:
        exist = on_device(tuple(keys), places.device)[:, None]
        lines = lines.masked_fill(forced >= exist, NOTHING)
    width = round_up(FORCED_VERTICALS + places.shape[1])
    filled = places.new_full((len(places), width - FORCED_VERTICALS - places.shape[1]), NOTHING)
    return torch.cat((lines, places, filled), 1)


def by_diagonals(sums: Sums, budgets: Sequence[HeadBudget]) -> Selections:
    """Vertical-slash as published: the heaviest columns and the heaviest single diagonals.

    Source: MInference (arXiv 2407.02490), section 3.2; a diagonal at distance s lies in the tiles
    at the distances floor(s / 128) and ceil(s / 128).

    Raises:
        ValueError: `sums` has no single diagonals.
    """
    if sums.diagonals is None:
        raise ValueError("selecting single diagonals needs their sums")
    slashes = _heaviest(sums.diagonals, [each.slashes for each in budgets], FORCED_SLASHES)
    tiles = sums.bands.shape[1]
    upper = (slashes + BLOCK_ROWS - 1) // BLOCK_ROWS
    touched = _marks(slashes // BLOCK_ROWS, tiles) | _marks(upper, tiles)
    return Selections(_columns(sums, budgets), _rising(touched, min(2 * slashes.shape[1], tiles)))


def by_coverage(sums: Sums, heavy: float, coverage: float) -> Selections:
    """Every heavy column, then bands until the last rows' attention is covered.

    Bands are weighed without the heavy columns, so nothing counts twice, and no budget is needed:
    a head that looks at little selects little.

    Args:
        sums: made with this `heavy`, so that they know which columns are.
        heavy: see `sums`; there are at most rows / heavy such columns.
        coverage: of the last rows' attention, 0 to 1.

    Raises:
        ValueError: `sums` does not know heavy columns.
    """
    if sums.heavy_columns is None:
        raise ValueError("selecting by coverage needs sums made with a limit for heavy columns")
    most = int(sums.rows / heavy) + FORCED_VERTICALS
    weights = _with_forced(sums.heavy_columns, FORCED_VERTICALS)
    values, order = weights.topk(min(most, weights.shape[1]))
    columns = _sorted_columns(torch.where(values > 0, order, NOTHING))
    found = sums.heavy_columns.sum(1, keepdim=True)
    values, order = _with_forced(sums.bands, 1).sort(1, descending=True)
    values[:, 0] = sums.bands[:, 0]
    before = found + values.cumsum(1) - values
    enough = before >= coverage * sums.rows
    enough[:, 0] = False
    bands = torch.where(enough, NOTHING, order)
    tiles = sums.bands.shape[1]
    return Selections(columns, _rising(_marks(bands, tiles) | _marks(bands + 1, tiles), tiles))


def _columns(sums: Sums, budgets: Sequence[HeadBudget]) -> Tensor:
    counts = [budget.verticals for budget in budgets]
    return _sorted_columns(_heaviest(sums.columns, counts, FORCED_VERTICALS))


def _heaviest(weights: Tensor, counts: Sequence[int], forced: int) -> Tensor:
    """Indices of each line's `counts[line]` heaviest, the first `forced` always among them.

    int64 [lines, most], filled up with `NOTHING`.
    """
    counts = tuple(min(max(count, forced), weights.shape[1]) for count in counts)
    most, forced = max(counts), min(forced, weights.shape[1])
    always = torch.arange(forced, device=weights.device).expand(len(weights), -1)
    order = torch.cat((always, weights[:, forced:].topk(most - forced).indices + forced), 1)
    allowed = on_device(counts, weights.device)[:, None]
    rank = torch.arange(most, device=weights.device)
    return order.masked_fill_(rank >= allowed, NOTHING)


def _with_forced(weights: Tensor, forced: int) -> Tensor:
    weights = weights.clone()
    weights[:, :forced] = torch.inf
    return weights


def _sorted_columns(columns: Tensor) -> Tensor:
    """Rising, and filled up to whole tiles."""
    missing = round_up(columns.shape[1]) - columns.shape[1]
    padded = torch.nn.functional.pad(columns.to(torch.int32), (0, missing), value=NOTHING)
    return padded.sort(1).values


def _marks(chosen: Tensor, size: int) -> Tensor:
    """bool [lines, size]: true at the chosen indices; those of `size` or more are left out."""
    marks = torch.zeros(len(chosen), size + 1, dtype=torch.bool, device=chosen.device)
    return marks.scatter_(1, chosen.clamp(max=size), True)[:, :size]


def _rising(chosen: Tensor, most: int) -> Tensor:
    """Where each line of `chosen`, bool [lines, size], is true: int32, filled up, `most` wide."""
    places = torch.arange(chosen.shape[1], dtype=torch.int32, device=chosen.device)
    return torch.where(chosen, places, NOTHING).sort(1).values[:, :most].contiguous()
