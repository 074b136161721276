"""One picture of what stands in the table: what each fault cost, and how long it was felt."""

import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_NOTHING_LOST, _LOST = "#4c6a92", "#c1121f"


def draw(rows: Path, path: Path) -> None:
    """A bar for each fault under load: seconds until a new request was answered.

    Args:
        rows: the suite's CSV file.
        path: its suffix says which kind of picture (.png, .svg).

    Raises:
        ValueError: no fault under load stands there.
    """
    faults = [line for line in _lines(rows) if _is_fault(line)]
    if not faults:
        raise ValueError(f"{rows} has no fault under load")
    figure = Figure(figsize=(8, 1 + 0.24 * len(faults)), layout="constrained")
    _draw(figure.subplots(), faults)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def _draw(axes: Axes, faults: list[dict[str, str]]) -> None:
    places = range(len(faults))
    seconds = [float(line["served_again_s"]) for line in faults]
    colours = [_LOST if _failed(line) else _NOTHING_LOST for line in faults]
    axes.barh(places, seconds, color=colours, height=0.7)
    axes.set_yticks(places, [_name(line) for line in faults], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds until a new request was answered")
    for place, length, line in zip(places, seconds, faults, strict=True):
        lost = f"{line['lost']} of {line['requests']} lost"
        wrong = f", {line['wrong']} wrong" if int(line["wrong"]) else ""
        axes.annotate(f" {lost}{wrong}", (length, place), va="center", fontsize=8)


def _is_fault(line: dict[str, str]) -> bool:
    """Whether a process is killed or stopped in it with requests under way, and others serve on."""
    kind = line["scenario"].partition("-")[0]
    is_felt = int(line["requests"]) and line["served_again_s"]
    return bool(is_felt) and kind in ("kill", "stop", "random")


def _failed(line: dict[str, str]) -> bool:
    return bool(int(line["lost"]) or int(line["wrong"]))


def _name(line: dict[str, str]) -> str:
    return line["scenario"].replace("-", " ")


def _lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
