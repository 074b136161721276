"""A picture of the benchmark's CSV file."""

import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_BLUE, _ORANGE = "#0072b2", "#d55e00"


def plot(source: Path, target: Path) -> None:
    """Draw the newest line of every operation and shape: against its baseline, and its ceiling."""
    with source.open(newline="", encoding="utf-8") as file:
        newest = {(row["operation"], row["shape"]): row for row in csv.DictReader(file)}
    rows = list(newest.values())
    compared = [row for row in rows if row["ratio"]]
    figure = Figure(figsize=(11, 1.2 + 0.3 * (len(compared) + len(rows))), layout="constrained")
    above, below = figure.subplots(2, height_ratios=[len(compared), len(rows)])
    _bars(above, compared, "ratio", "times as fast as the baseline", _BLUE)
    above.set_xscale("log")
    above.axvline(1, color="black", linewidth=0.8)
    _bars(below, rows, "fraction", "fraction of the ceiling measured in the same run", _ORANGE)
    below.axvline(1, color="black", linewidth=0.8)
    machines = sorted({f"{row['gpu']}, torch {row['torch']}" for row in rows})
    figure.suptitle("; ".join(machines))
    figure.savefig(target)


def _bars(axes: Axes, rows: list[dict[str, str]], column: str, title: str, colour: str) -> None:
    values = [float(row[column]) for row in rows]
    baselines = [f" vs {row['baseline']}" if column == "ratio" else "" for row in rows]
    names = [
        f"{row['operation']}{baseline}\n{row['shape']}"
        for row, baseline in zip(rows, baselines, strict=True)
    ]
    bars = axes.barh(names, values, color=colour)
    axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=7)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.1)
