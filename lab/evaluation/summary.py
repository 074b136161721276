"""Records put together: shares with their confidence intervals, and how many prompts they are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from .intervals import wilson
from .records import Record, cells_of


@dataclass(frozen=True)
class Cell:
    """Some prompts of one task, variant and length; depth None holds all depths together.

    `score` is the mean, `right` the prompts that scored 1, and [low, high] the 95 % confidence
    interval of the mean (Wilson).
    """

    task: str
    variant: str
    tokens: int
    depth: float | None
    prompts: int
    right: int
    score: float
    low: float
    high: float

    @classmethod
    def of(cls, records: Sequence[Record], depth: float | None = None) -> "Cell":
        """Of records that share task, variant and length."""
        first, total = records[0], sum(record.score for record in records)
        interval = wilson(total, len(records))
        return cls(
            first.task,
            first.variant,
            first.tokens,
            depth,
            len(records),
            sum(record.score == 1 for record in records),
            round(total / len(records), 4),
            round(interval.low, 4),
            round(interval.high, 4),
        )

    def described(self) -> str:
        """As "19 of 20, 95 % (76 to 99 %)"."""
        return (
            f"{self.right} of {self.prompts}, {self.score:.0%} ({self.low:.0%} to {self.high:.0%})"
        )


@dataclass(frozen=True)
class Summary:
    """`cells` are by depth where depths were chosen, `overall` has one cell for all depths."""

    model: str
    settings: Mapping[str, str]
    cells: tuple[Cell, ...]
    overall: tuple[Cell, ...]

    @classmethod
    def of(cls, settings: Mapping[str, str], records: Sequence[Record]) -> "Summary":
        """Of all records of a file."""
        by_depth = [Cell.of(group, key[3]) for key, group in cells_of(records).items()]
        together: dict[tuple[str, str, int], list[Record]] = {}
        for record in records:
            together.setdefault((record.task, record.variant, record.tokens), []).append(record)
        return cls(
            records[0].model if records else "",
            settings,
            tuple(by_depth),
            tuple(Cell.of(group) for group in together.values()),
        )

    @property
    def tasks(self) -> list[str]:
        """In the order in which they were asked."""
        return list(dict.fromkeys(cell.task for cell in self.overall))

    @property
    def variants(self) -> list[str]:
        """In the order in which they were asked."""
        return list(dict.fromkeys(cell.variant for cell in self.overall))

    @property
    def lengths(self) -> list[int]:
        """Rising."""
        return sorted({cell.tokens for cell in self.overall})

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8")

    def table(self) -> Table:
        """A row for each task and length, a column for each variant."""
        table = Table(title=f"{self.model}: right answers, with 95 % confidence intervals")
        table.add_column("task")
        table.add_column("tokens", justify="right")
        for variant in self.variants:
            table.add_column(variant)
        found = {(cell.task, cell.tokens, cell.variant): cell for cell in self.overall}
        for task in self.tasks:
            for tokens in self.lengths:
                row = [found.get((task, tokens, variant)) for variant in self.variants]
                if any(row):
                    described = [cell.described() if cell else "" for cell in row]
                    table.add_row(task, f"{tokens:,}", *described)
        return table
