"""What the panels show on a Prometheus that scrapes a cluster, and what is wrong with that.

python -m longreach.deploy.dashboards.shown http://localhost:9090 --minutes 30 --pictures pictures

A panel is wrong whose query Prometheus does not understand, that shows nothing, or that shows what
is no number. It tells you so of your own Prometheus too.
"""

import argparse
import re
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from .boards import BOARDS
from .panels import Board, Panel, Query, Source
from .pictures import Curve, draw
from .prometheus import Prometheus, QueryError, Span

_POINTS = 240
VARIABLES = {"$gpus": "8", "$cost": "2.5"}
"""The dashboards' own, at their defaults."""


@dataclass(frozen=True)
class Shown:
    """What a panel shows: its curves, or why it does not."""

    panel: Panel
    curves: tuple[Curve, ...]
    problem: str | None


def shown(prometheus: Prometheus, board: Board, span: Span) -> Iterator[Shown]:
    """Each panel of a board, in its order."""
    for panel in board.panels:
        curves: list[Curve] = []
        problem: str | None = None
        for query in panel.queries:
            try:
                found = list(_curves(prometheus, query, span))
            except QueryError as error:
                problem = f"{query.expression} is refused: {error}"
                continue
            if not found:
                problem = f"{query.expression} shows nothing"
            elif not all(curve.series.is_finite for curve in found):
                problem = f"{query.expression} shows what is no number"
            curves += found
        yield Shown(panel, tuple(curves), problem)


def _curves(prometheus: Prometheus, query: Query, span: Span) -> Iterator[Curve]:
    for series in prometheus.over(query.expression, span):
        yield Curve(_named(query.legend, series.labels), series)


def _named(legend: str, labels: Mapping[str, str]) -> str:
    """As Grafana fills it in: a label that a series does not have is nothing."""
    return re.sub(r"\{\{(\w+)\}\}", lambda name: labels.get(name[1], ""), legend).strip()


def problems(
    prometheus: Prometheus, span: Span, sources: Collection[Source], pictures: Path | None = None
) -> Iterator[str]:
    """What is wrong with panels of figures that there are to be.

    Args:
        sources: whose figures this Prometheus has; other panels are not asked about.
        pictures: a folder for a picture of each board; None: none are drawn.
    """
    for board in BOARDS:
        panels = list(shown(prometheus, board, span))
        for each in panels:
            if each.problem is not None and each.panel.source in sources:
                yield f"{board.title}, {each.panel.title}: {each.problem}"
        if pictures is not None:
            curves = [(each.panel, each.curves) for each in panels]
            draw(board.title, curves, span, pictures / f"{board.name}.png")


def main() -> int:
    """Every problem, and their number; status 1 where there is one."""
    parser = argparse.ArgumentParser(
        prog="python -m longreach.deploy.dashboards.shown", description=__doc__
    )
    parser.add_argument("prometheus", help="its URL")
    parser.add_argument("--minutes", type=float, default=30, help="so far back from now")
    parser.add_argument("--window", default="1m", help="over which rates are taken")
    parser.add_argument("--pictures", type=Path, help="a folder for a picture of each board")
    parser.add_argument(
        "--without",
        action="append",
        choices=get_args(Source),
        default=[],
        help="whose figures this Prometheus does not scrape; repeatable",
    )
    options = parser.parse_args()
    now = time.time()
    seconds = options.minutes * 60
    span = Span(now - seconds, now, max(seconds / _POINTS, 1.0))
    prometheus = Prometheus(options.prometheus, options.window, VARIABLES)
    sources = set(get_args(Source)) - set(options.without)
    found = list(problems(prometheus, span, sources, options.pictures))
    print(*found, f"{len(found)} panels are wrong", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
