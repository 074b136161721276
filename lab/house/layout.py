"""Places boxes in rows so that every arrow runs downward and few of them cross.

After Sugiyama, Tagawa and Toda (1981): an arrow over several rows gets a narrow place in each row
on its way, rows are ordered by the means of their neighbours, and boxes then move towards these.
The same input always gives the same picture.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

_SWEEPS = 80
_GAP = 18.0
_PASSAGE_WIDTH = 8.0
_PASSAGE_WEIGHT = 8.0
"""How much more an arrow's places pull at each other than at boxes: long arrows are straight."""

Place = str | tuple[str, str, int]
"""A box by its name, or where an arrow from the first to the second passes a row."""


@dataclass(frozen=True)
class Layout:
    """Centres of boxes, and of the places that each arrow passes from its source to its target."""

    centres: dict[str, float]
    passages: dict[tuple[str, str], list[float]]
    width: float


def place(
    rows: Sequence[Sequence[str]], widths: Mapping[str, float], arrows: Mapping[str, Set[str]]
) -> Layout:
    """Lay rows out, the uppermost first.

    Args:
        rows: names of boxes; every arrow leads to a later row.
        widths: of the boxes.
        arrows: from a name to those that it points to.
    """
    graph = _Graph(rows, widths, arrows)
    graph.order()
    graph.move()
    return graph.layout()


class _Graph:
    def __init__(
        self,
        rows: Sequence[Sequence[str]],
        widths: Mapping[str, float],
        arrows: Mapping[str, Set[str]],
    ) -> None:
        self._rows: list[list[Place]] = [list(row) for row in rows]
        self._widths = widths
        self._row_of = {name: number for number, row in enumerate(rows) for name in row}
        self._arrows = [
            (name, target) for name in sorted(arrows) for target in sorted(arrows[name])
        ]
        self._above: dict[Place, list[Place]] = {}
        self._below: dict[Place, list[Place]] = {}
        for arrow in self._arrows:
            self._connect(arrow)
        self._x: dict[Place, float] = {}

    def order(self) -> None:
        """Order each row by the means of its neighbours, keeping the best that was met."""
        best, fewest = self._rows, self._crossings()
        for sweep in range(_SWEEPS):
            downward = sweep % 2 == 0
            neighbours = self._above if downward else self._below
            self._rows = [list(row) for row in self._rows]
            rank = self._ranks()
            for row in self._rows if downward else reversed(self._rows):
                means = {each: _mean(rank, neighbours.get(each, ()), rank[each]) for each in row}
                row.sort(key=means.__getitem__)
                rank.update(_relative(row))
            crossings = self._crossings()
            if crossings < fewest:
                best, fewest = self._rows, crossings
        self._rows = best

    def move(self) -> None:
        """Give every place an x near its neighbours', in the order of its row."""
        for row in self._rows:
            alike = [1.0] * len(row)
            self._x.update(zip(row, _spread(alike, alike, self._sizes(row)), strict=True))
        for sweep in range(_SWEEPS):
            for row in self._rows if sweep % 2 else reversed(self._rows):
                wanted, weights = zip(*(self._wanted(each) for each in row), strict=True)
                self._x.update(zip(row, _spread(wanted, weights, self._sizes(row)), strict=True))

    def layout(self) -> Layout:
        """What came out, with the leftmost edge at 0."""
        edges = [
            (x - self._width(each) / 2, x + self._width(each) / 2) for each, x in self._x.items()
        ]
        left, right = min(edge[0] for edge in edges), max(edge[1] for edge in edges)
        x = {each: value - left for each, value in self._x.items()}
        return Layout(
            {each: value for each, value in x.items() if isinstance(each, str)},
            {arrow: [x[each] for each in self._passed(arrow)] for arrow in self._arrows},
            right - left,
        )

    def _connect(self, arrow: tuple[str, str]) -> None:
        passed = self._passed(arrow)
        for each in passed:
            self._rows[each[2]].append(each)
        chain: list[Place] = [arrow[0], *passed, arrow[1]]
        for upper, lower in pairwise(chain):
            self._below.setdefault(upper, []).append(lower)
            self._above.setdefault(lower, []).append(upper)

    def _passed(self, arrow: tuple[str, str]) -> list[tuple[str, str, int]]:
        source, target = arrow
        between = range(self._row_of[source] + 1, self._row_of[target])
        return [(source, target, row) for row in between]

    def _ranks(self) -> dict[Place, float]:
        return {each: rank for row in self._rows for each, rank in _relative(row).items()}

    def _crossings(self) -> int:
        total = 0
        for upper, lower in pairwise(self._rows):
            rank = {each: number for number, each in enumerate(lower)}
            ends = [
                number
                for each in upper
                for number in sorted(rank[end] for end in self._below.get(each, ()))
            ]
            total += sum(a > b for at, a in enumerate(ends) for b in ends[at + 1 :])
        return total

    def _wanted(self, each: Place) -> tuple[float, float]:
        """Where a place would like to be, and how much."""
        pulls = [
            (self._x[other], _PASSAGE_WEIGHT if not isinstance(other, str) else 1.0)
            for other in (*self._above.get(each, ()), *self._below.get(each, ()))
        ]
        if not pulls:
            return self._x[each], 0.1
        weight = sum(weight for _, weight in pulls)
        mean = sum(x * weight for x, weight in pulls) / weight
        return mean, weight if isinstance(each, str) else weight * _PASSAGE_WEIGHT

    def _sizes(self, row: Sequence[Place]) -> list[float]:
        return [self._width(each) + _GAP for each in row]

    def _width(self, each: Place) -> float:
        return self._widths[each] if isinstance(each, str) else _PASSAGE_WIDTH


def _relative(row: Sequence[Place]) -> dict[Place, float]:
    return {each: (number + 0.5) / len(row) for number, each in enumerate(row)}


def _mean(rank: Mapping[Place, float], others: Sequence[Place], otherwise: float) -> float:
    return sum(rank[other] for other in others) / len(others) if others else otherwise


def _spread(
    wanted: Sequence[float], weights: Sequence[float], sizes: Sequence[float]
) -> list[float]:
    """Centres nearest to what is wanted, in this order and without overlaps.

    Least squares, by pooling neighbours that violate the order (isotonic regression).
    """
    offsets: list[float] = []
    total = 0.0
    for size in sizes:
        offsets.append(total + size / 2)
        total += size
    pools: list[tuple[float, float, int]] = []  # mean, weight, members
    for want, weight, offset in zip(wanted, weights, offsets, strict=True):
        mean, members = want - offset, 1
        while pools and pools[-1][0] > mean:
            before, heft, count = pools.pop()
            mean = (before * heft + mean * weight) / (heft + weight)
            weight, members = heft + weight, members + count
        pools.append((mean, weight, members))
    means = [mean for mean, _, members in pools for _ in range(members)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]
