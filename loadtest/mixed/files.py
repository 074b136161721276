"""Results for programs: a JSON file of everything, and CSV files of requests and of classes."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .record import Record
from .slo import Slo
from .summary import ClassSummary, Spread, Summary

_TIMES = ("first_token", "inter_token", "per_token", "end_to_end")


def write_json(path: Path, about: Mapping[str, Any], **results: Any) -> None:
    """One object: what was measured, and what came of it."""
    content = {"about": about, **results}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def summary_object(summary: Summary) -> dict[str, Any]:
    """A summary as JSON has it, rates included."""
    return {
        "seconds": summary.seconds,
        "late": None if summary.late is None else asdict(summary.late),
        "good_per_second": summary.good_per_second,
        "answer_tokens_per_second": summary.answer_tokens_per_second,
        "classes": [asdict(each) for each in (*summary.kinds, summary.whole)],
    }


def request_row(record: Record, slo: Slo) -> dict[str, Any]:
    """One request, flat."""
    return {
        "number": record.ask.number,
        "class": record.ask.kind,
        "tokens": record.ask.tokens,
        "prompt_tokens": record.prompt_tokens,
        "answer_tokens": record.answer_tokens,
        "sent": record.sent,
        "late": record.late,
        "first_token": record.first_token,
        "per_token": record.per_token,
        "longest_gap": max(record.gaps, default=None),
        "end_to_end": record.ended,
        "verdict": record.verdict,
        "error": None if record.failure is None else record.failure.name,
        "said": None if record.failure is None else record.failure.said,
        "good": slo.is_met_by(record),
    }


def summary_rows(load: str, summary: Summary) -> list[dict[str, Any]]:
    """A row for each class, and one for all."""
    return [_summary_row(load, each) for each in (*summary.kinds, summary.whole)]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows that all have the same columns, at least one."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(_rounded(row) for row in rows)


def _summary_row(load: str, each: ClassSummary) -> dict[str, Any]:
    counts = ("requests", "good", "right", "wrong", "unchecked", "failed")
    row: dict[str, Any] = {"load": load, "class": each.kind}
    row |= {name: getattr(each, name) for name in counts}
    for name in _TIMES:
        values: Spread | None = getattr(each, name)
        for percentile in ("p50", "p90", "p99"):
            row[f"{name}_{percentile}"] = None if values is None else getattr(values, percentile)
    errors: Iterable[tuple[str, int]] = each.errors.items()
    row["errors"] = "; ".join(f"{count} x {name}" for name, count in errors)
    return row


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()
    }
