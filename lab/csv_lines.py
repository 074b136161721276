"""Benchmarks as data: lines of one kind in a CSV file."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def append(path: Path, lines: "Sequence[DataclassInstance]") -> None:
    """Add lines of one kind to the CSV file, made with its header where it is not there."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(lines[0])])
        if new:
            writer.writeheader()
        for line in lines:
            row = asdict(line)
            writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
