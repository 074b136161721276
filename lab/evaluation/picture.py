"""Pictures of summaries: heat maps over length and depth, and shares with error bars.

Colours are those of "cividis", which reads the same with any kind of colour vision, and every
cell says its numbers besides.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..lengths import format_length
from .recall import RecallReport
from .summary import Cell, Summary

_COLOURS = "cividis"
_MARKERS = "osD^vP"
_DARK = 0.6
"""Below this a cell is dark, and what is written on it is white."""


def draw(summary: Summary, path: Path) -> None:
    """Write a picture; the suffix says which kind (.png, .svg).

    With chosen depths: a heat map over length and depth for each task and variant. Without, one
    task: its shares by length. Without, several tasks: a heat map over tasks and length for each
    variant, or for few tasks their shares by length.
    """
    if any(cell.depth is not None for cell in summary.cells):
        figure = _by_depth(summary)
    elif len(summary.tasks) > 2:
        figure = _by_task(summary)
    else:
        figure = _by_length(summary)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def draw_recall(report: RecallReport, path: Path) -> None:
    """Write heat maps of recall over layers and heads: of all queries, and of the last ones."""
    grids = {"all queries": report.grid(), "the last 64 queries": report.grid(last=True)}
    layers, heads = report.grid().shape
    figure, panels = new_figure(1, len(grids), 0.5 * heads + 1.5, 0.4 * layers + 1)
    rows, columns = list(map(str, range(layers))), list(map(str, range(heads)))
    image = None
    for axes, (name, values) in zip(panels.flat, grids.items(), strict=True):
        texts = [[f"{value:.2f}" for value in row] for row in values]
        image = heat_map(axes, values, texts, rows, columns)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("query head")
    panels[0, 0].set_ylabel("layer")
    _finish(figure, panels, image, report.title.replace(", ", ",\n", 1))
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def heat_map(
    axes: Axes,
    values: npt.NDArray[np.float64],
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
) -> Any:
    """Draw values [rows, columns], 0 to 1, with a text in each; NaN leaves a cell empty."""
    image = axes.imshow(values, cmap=_COLOURS, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for row, column in np.argwhere(~np.isnan(values)).tolist():
        axes.text(
            column,
            row,
            texts[row][column],
            ha="center",
            va="center",
            fontsize=8,
            color="white" if values[row, column] < _DARK else "black",
        )
    return image


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure with a grid of panels, each `width` × `height` inches; axes [rows, columns]."""
    figure = Figure(figsize=(columns * width + 1.5, rows * height + 0.8), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _by_depth(summary: Summary) -> Figure:
    cells = {(c.task, c.variant, c.tokens, c.depth): c for c in summary.cells}
    depths = sorted({cell.depth for cell in summary.cells if cell.depth is not None})
    tasks = [task for task in summary.tasks if any(c.task == task for c in summary.cells)]
    figure, panels = new_figure(
        len(tasks),
        len(summary.variants),
        max(2.4, 0.62 * len(summary.lengths) + 0.6),
        max(2.2, 0.42 * len(depths) + 0.7),
    )
    image = None
    for row, task in enumerate(tasks):
        for column, variant in enumerate(summary.variants):
            grid = [
                [cells.get((task, variant, tokens, depth)) for tokens in summary.lengths]
                for depth in depths
            ]
            axes = panels[row, column]
            names = [f"{depth:.0%}" for depth in depths]
            image = _heat_map_of_cells(axes, grid, names, summary.lengths)
            axes.set_title(f"{task}, {variant}", fontsize=10)
            if column == 0:
                axes.set_ylabel("depth of the fact")
            if row == len(tasks) - 1:
                axes.set_xlabel("prompt tokens")
    return _finish(figure, panels, image, f"Share of right answers: {summary.model}")


def _by_task(summary: Summary) -> Figure:
    cells = {(c.task, c.variant, c.tokens): c for c in summary.overall}
    figure, panels = new_figure(
        1,
        len(summary.variants),
        max(3.2, 0.62 * len(summary.lengths) + 1.4),
        0.42 * len(summary.tasks) + 0.7,
    )
    image = None
    for column, variant in enumerate(summary.variants):
        grid = [
            [cells.get((task, variant, tokens)) for tokens in summary.lengths]
            for task in summary.tasks
        ]
        axes = panels[0, column]
        image = _heat_map_of_cells(axes, grid, summary.tasks, summary.lengths)
        axes.set_title(variant, fontsize=10)
        axes.set_xlabel("prompt tokens")
    return _finish(figure, panels, image, f"Mean score and prompts: {summary.model}")


def _by_length(summary: Summary) -> Figure:
    figure, panels = new_figure(1, len(summary.tasks), 5, 3.6)
    places = {tokens: place for place, tokens in enumerate(summary.lengths)}
    colours = _line_colours(summary.variants)
    for column, task in enumerate(summary.tasks):
        axes: Axes = panels[0, column]
        for number, variant in enumerate(summary.variants):
            cells = sorted(
                (c for c in summary.overall if (c.task, c.variant) == (task, variant)),
                key=lambda cell: cell.tokens,
            )
            aside = 0.08 * (number - (len(summary.variants) - 1) / 2)
            axes.errorbar(
                [places[cell.tokens] + aside for cell in cells],
                [cell.score for cell in cells],
                [[c.score - c.low for c in cells], [c.high - c.score for c in cells]],
                marker=_MARKERS[number % len(_MARKERS)],
                color=colours[variant],
                capsize=3,
                label=variant,
            )
        axes.set_title(task, fontsize=10)
        axes.set_xticks(
            range(len(summary.lengths)),
            [f"{format_length(t)}\nn={_prompts(summary, task, t)}" for t in summary.lengths],
        )
        axes.set_xlabel("prompt tokens")
        axes.set_ylim(-0.05, 1.05)
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("share of right answers, with 95 % interval")
    panels[0, 0].legend()
    figure.suptitle(f"Share of right answers: {summary.model}")
    return figure


def _prompts(summary: Summary, task: str, tokens: int) -> str:
    """How many prompts each variant was asked, one number where all are alike."""
    counts = {c.prompts for c in summary.overall if (c.task, c.tokens) == (task, tokens)}
    return "/".join(map(str, sorted(counts)))


def _line_colours(variants: Sequence[str]) -> Mapping[str, str]:
    # Okabe and Ito's palette, made for colour-blind readers.
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    return {variant: palette[i % len(palette)] for i, variant in enumerate(variants)}


def _heat_map_of_cells(
    axes: Axes, grid: Sequence[Sequence[Cell | None]], rows: Sequence[str], lengths: Sequence[int]
) -> Any:
    values = np.array([[cell.score if cell else np.nan for cell in row] for row in grid], float)
    texts = [[_numbers(cell) if cell else "" for cell in row] for row in grid]
    return heat_map(axes, values, texts, rows, [format_length(tokens) for tokens in lengths])


def _numbers(cell: Cell) -> str:
    """Right of all; where scores lie between, the mean and of how many."""
    whole = abs(cell.right - cell.score * cell.prompts) < 0.06
    return f"{cell.right}/{cell.prompts}" if whole else f"{cell.score:.2f}\nn={cell.prompts}"


def _finish(figure: Figure, panels: Any, image: Any, title: str) -> Figure:
    figure.colorbar(image, ax=panels, shrink=0.8)
    figure.suptitle(title)
    return figure
