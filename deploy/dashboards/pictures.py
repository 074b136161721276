"""Boards as pictures, for pages that have no Grafana."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, PercentFormatter

from .panels import Panel
from .prometheus import Series, Span

_COLUMNS = 3
_PANEL_INCHES = (4.4, 2.3)
_DOTS_PER_INCH = 72
_MOST_NAMES = 8
_NAMES_ABREAST = 3
_ROOM_ABOVE = 1.35
"""Of the highest value, for the names of the curves."""
_WITH_PREFIX = {"s": "s", "bytes": "B", "Bps": "B/s"}
_PLAIN = {"reqps": "/s", "currencyUSD": " $"}


@dataclass(frozen=True)
class Curve:
    """A series by its name in the legend."""

    name: str
    series: Series


def draw(
    title: str, panels: Sequence[tuple[Panel, Sequence[Curve]]], span: Span, path: Path
) -> None:
    """A board's panels beside each other, over the minutes of a span; red is where red begins."""
    rows = -(-len(panels) // _COLUMNS)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * _COLUMNS, height * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    places = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for (panel, curves), axes in zip(panels, places, strict=False):
        _draw(axes, panel, curves, span)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title)
    figure.supxlabel("minutes", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DOTS_PER_INCH, metadata={"Software": None})


def _draw(axes: Axes, panel: Panel, curves: Sequence[Curve], span: Span) -> None:
    drawn = (value for curve in curves for value in curve.series.values if math.isfinite(value))
    highest = max(drawn, default=0.0)
    for curve in curves:
        axes.plot(*_with_gaps(curve.series, span), label=curve.name, linewidth=1.2, clip_on=False)
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlim(0, (span.end - span.start) / 60)
    axes.set_ylim(0, (highest or 1.0) * _ROOM_ABOVE)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.yaxis.set_major_formatter(_unit(panel.unit))
    if not curves:
        axes.text(0.5, 0.5, "nothing here", transform=axes.transAxes, ha="center", color="grey")
    elif len(curves) <= _MOST_NAMES and any(curve.name for curve in curves):
        axes.legend(fontsize=6, loc="upper left", ncols=_NAMES_ABREAST, frameon=False)
    if panel.red is not None and axes.get_ylim()[1] >= panel.red:
        axes.axhline(panel.red, color="#c1121f", linestyle="--", linewidth=1)


def _with_gaps(series: Series, span: Span) -> tuple[list[float], list[float]]:
    """Minutes and values; where there were none for a while, the line is broken."""
    minutes: list[float] = []
    values: list[float] = []
    before = series.times[0]
    for at, value in zip(series.times, series.values, strict=True):
        if at - before > 1.5 * span.step:
            minutes.append((at - span.start) / 60)
            values.append(math.nan)
        minutes.append((at - span.start) / 60)
        values.append(value)
        before = at
    return minutes, values


def _unit(unit: str) -> Formatter:
    if unit in ("percentunit", "percent"):
        return PercentFormatter(1 if unit == "percentunit" else 100)
    if unit in _WITH_PREFIX:
        return EngFormatter(_WITH_PREFIX[unit], sep=" ")
    return FuncFormatter(lambda value, _: f"{value:,g}{_PLAIN.get(unit, '')}")
