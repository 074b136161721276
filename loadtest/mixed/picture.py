"""One picture of a measurement: who waited how long, and who was answered as wanted."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .record import Record
from .slo import Slo
from .summary import ClassSummary, Summary
from .sweep import Step, highest

_BAD = "#c1121f"
Colour = tuple[float, float, float, float]


def draw_run(records: Sequence[Record], summary: Summary, slo: Slo, title: str, path: Path) -> None:
    """A dot for each request, where it was sent and how long it waited; beside it, what was good.

    Args:
        records: one at least.
        path: its suffix says which kind of picture (.png, .svg).
    """
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1.25))
    colours = _colours([each.kind for each in summary.kinds])
    _draw_waits(left, records, slo, colours)
    _draw_shares(right, summary, colours)
    # Below, where it covers nobody.
    handles, labels = left.get_legend_handles_labels()
    names = [f"{label} tokens" if label in colours else label for label in labels]
    figure.legend(handles, names, loc="outside lower left", ncols=len(names), frameon=False)
    _save(figure, title, path)


def draw_sweep(steps: Sequence[Step], hold: float, unit: str, title: str, path: Path) -> None:
    """Good answers of each class by load, and the highest load that holds."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(steps, key=lambda step: step.load)
    kinds = [each.kind for each in ordered[0].summary.kinds]
    for index, (kind, colour) in enumerate(_colours(kinds).items()):
        shares = [step.summary.kinds[index].good_share * 100 for step in ordered]
        axes.plot([step.load for step in ordered], shares, "o-", color=colour, label=kind)
    axes.axhline(hold * 100, color="grey", linestyle="--", linewidth=1)
    most = highest(steps)
    if most is not None:
        axes.axvline(most, color="black", linewidth=1)
        axes.annotate(f" {most:.3g} holds", (most, 4))
    axes.set(xlabel=unit, ylabel="good answers, %", ylim=(0, 104), xscale="log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(title="prompt tokens")
    _save(figure, title, path)


def _draw_waits(
    axes: Axes, records: Sequence[Record], slo: Slo, colours: Mapping[str, Colour]
) -> None:
    for kind, colour in colours.items():
        own = [record for record in records if record.ask.kind == kind]
        good = [record for record in own if slo.is_met_by(record)]
        axes.scatter(
            [each.sent for each in good], list(map(_wait, good)), color=colour, s=28, label=kind
        )
        for limit in {slo.wait(record.ask.tokens) for record in own}:
            axes.axhline(limit, color=colour, linestyle="--", linewidth=1)
        # A bad one keeps its class's colour inside, so that one sees whose it is.
        bad = [record for record in own if not slo.is_met_by(record)]
        axes.scatter(
            [each.sent for each in bad],
            list(map(_wait, bad)),
            color=colour,
            edgecolors=_BAD,
            linewidths=1.6,
            marker="X",
            s=70,
        )
    axes.scatter([], [], color="white", edgecolors=_BAD, marker="X", s=70, label="not good")
    axes.plot([], [], color="grey", linestyle="--", linewidth=1, label="SLO")
    axes.set(xlabel="sent after seconds", ylabel="seconds to the first token", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _wait(record: Record) -> float:
    """Until its first token, or until it failed without one."""
    return record.ended if record.first_token is None else record.first_token


def _draw_shares(axes: Axes, summary: Summary, colours: Mapping[str, Colour]) -> None:
    kinds = [each for each in summary.kinds if each.requests]
    places = range(len(kinds))
    axes.barh(
        places,
        [each.good_share * 100 for each in kinds],
        color=[colours[each.kind] for each in kinds],
        alpha=0.45,
    )
    axes.set_yticks(places, [each.kind for each in kinds])
    axes.invert_yaxis()
    axes.set(xlabel="good answers, %", xlim=(0, 100))
    for place, each in zip(places, kinds, strict=True):
        axes.annotate(_said(each), (3, place), va="center", fontsize=8)


def _said(each: ClassSummary) -> str:
    counts = f"{each.good} of {each.requests} good"
    if each.wrong or each.failed:
        counts += f", {each.wrong} wrong, {each.failed} failed"
    waits = each.first_token
    if waits is None:
        return counts
    return f"{counts}\nfirst token p50 {waits.p50:.2f} s, p99 {waits.p99:.2f} s"


def _colours(kinds: Sequence[str]) -> dict[str, Colour]:
    """Of "cividis", which reads the same with any kind of colour vision."""
    chosen = colormaps["cividis"]
    last = max(1, len(kinds) - 1)
    return {kind: chosen(0.9 * number / last) for number, kind in enumerate(kinds)}


def _save(figure: Figure, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=10)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
