"""What came of each scenario: a table for people, and a file for those who compare."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One scenario. An empty figure is one that this scenario does not have.

    Attributes:
        load: what the cluster was doing.
        requests: honest ones, whose answers are checked.
        lost: of these, not answered to the end.
        wrong: answered, with something else than the key.
        hung: took over ten seconds longer than alone.
        leaked_pages: in use ten seconds after everything had ended.
        served_again_s: until a new request was answered right, from the moment of the fault.
        ready_again_s: until `/ready` said so.
    """

    scenario: str
    load: str
    requests: int
    lost: int
    wrong: int
    hung: int
    leaked_pages: int | None
    served_again_s: float | None
    ready_again_s: float | None
    commit: str


COLUMNS = tuple(field.name for field in fields(Row))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into a CSV file, in place of earlier ones of the same scenario and load."""
    fresh = {(row.scenario, row.load): _as_text(row) for row in rows}
    kept = [line for line in _read(path) if (line["scenario"], line["load"]) not in fresh]
    lines = sorted([*kept, *fresh.values()], key=lambda line: (line["scenario"], line["load"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def table(rows: Iterable[Row]) -> Table:
    """All of a row but the commit, which is the same for all."""
    made = Table(title="what the clients noticed", title_justify="left")
    for name in COLUMNS[:-1]:
        is_text = name in ("scenario", "load")
        made.add_column(
            name.replace("_", " "), justify="left" if is_text else "right", no_wrap=is_text
        )
    for row in rows:
        text = _as_text(row)
        made.add_row(*(text[name] for name in COLUMNS[:-1]))
    return made


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _as_text(row: Row) -> dict[str, str]:
    return {name: _figure(value) for name, value in asdict(row).items()}


def _figure(value: str | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if isinstance(value, float) else str(value)
