"""Benchmarks as data: lines of one kind in a CSV file."""

import csv
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def append(path: Path, lines: "Sequence[DataclassInstance]") -> None:
    """Add lines of one kind to the CSV file, made with its header where it is not there.

    What a line consists of is a column each, and so is what these consist of.
    """
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(_columns(lines[0])), lineterminator="\n")
        if new:
            writer.writeheader()
        for line in lines:
            row = _columns(line)
            writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


def _columns(line: Any) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for field in fields(line):
        value = getattr(line, field.name)
        columns.update(_columns(value) if is_dataclass(value) else {field.name: value})
    return columns
