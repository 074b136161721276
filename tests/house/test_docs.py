"""The reference pages say what the code says."""

import json
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from longreach.cluster import metrics as m
from longreach.cluster.settings import Settings
from longreach.lab.engine_bench.lines import Line

DOCS = Path(__file__).parents[2] / "docs"


def metrics_table() -> str:
    rows = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in m.VOCABULARY:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        kind = type(metric).__name__.lower()
        rows.append(f"| `{metric.name}` | {kind} | {labels} | {metric.help} |")
    return "\n".join(rows)


def table(page: str, header: str) -> list[str]:
    """Rows of the one table of a page whose header begins so."""
    lines = (DOCS / page).read_text().splitlines()
    [start] = [number for number, line in enumerate(lines) if line.startswith(header)]
    return list(takewhile(lambda line: line.startswith("|"), lines[start + 2 :]))


def test_every_metric_is_documented_as_it_is() -> None:
    assert metrics_table() in (DOCS / "metrics.md").read_text(), metrics_table()


def test_the_vocabulary_has_every_metric_once() -> None:
    declared = [v for v in vars(m).values() if isinstance(v, m.Counter | m.Gauge | m.Histogram)]
    assert len(m.VOCABULARY) == len({metric.name for metric in m.VOCABULARY})
    assert {metric.name for metric in declared} == {metric.name for metric in m.VOCABULARY}
    assert all(metric.name.startswith("longreach_") for metric in declared)
    assert all(metric.name.endswith("_total") for metric in declared if type(metric) is m.Counter)


def test_every_setting_is_documented_with_its_default() -> None:
    documented = [row.split(" | ")[:2] for row in table("configuration.md", "| key | default |")]
    expected = []
    for name, section in Settings.model_fields.items():
        # Of a section that may come several times, the annotation is a tuple.
        keys = next(iter(get_args(section.annotation)), section.annotation)
        assert isinstance(keys, type)
        assert issubclass(keys, BaseModel)
        for key, field in keys.model_fields.items():
            default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
            expected.append([f"| `{name}.{key}`", default.replace('"', "")])
    assert documented == expected


def test_every_column_of_the_engines_benchmark_is_explained() -> None:
    first_cells = " ".join(row.split(" | ")[0] for row in table("one-gpu.md", "| column"))
    names = [field.name for field in fields(Line)]
    measured = names[names.index("ttft") : names.index("environment")]
    assert {name for name in measured if f"`{name}`" not in first_cells} == set()
