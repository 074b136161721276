"""What a dashboard says, without Grafana's words for it."""

from dataclasses import dataclass
from typing import Literal

Source = Literal["longreach", "ray", "dcgm"]
MODEL, WINDOW = "$model", "$__rate_interval"
"""Grafana's variables in queries."""


@dataclass(frozen=True)
class Query:
    """PromQL, and the name of each series in the legend."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """`act`: what a person does when it is red. `red`: from which value on it is; None: never.

    `below`: it is red below the value. `source`: whose figures it shows.
    """

    title: str
    unit: str
    act: str
    queries: tuple[Query, ...]
    red: float | None = None
    below: bool = False
    source: Source = "longreach"


@dataclass(frozen=True)
class Board:
    """A dashboard; `name` is that of its file."""

    name: str
    title: str
    panels: tuple[Panel, ...]


def of_model(metric: str, **labels: str) -> str:
    """A metric's series of the models that are looked at."""
    selected = "".join(f',{label}="{value}"' for label, value in labels.items())
    return f'{metric}{{model_name=~"{MODEL}"{selected}}}'


def total(metric: str, by: str = "", **labels: str) -> str:
    """A gauge, summed over all that is scraped."""
    return f"sum{_by(by)}({of_model(metric, **labels)})"


def per_second(metric: str, by: str = "", **labels: str) -> str:
    """How fast a counter grows, in all."""
    return f"sum{_by(by)}(rate({of_model(metric, **labels)}[{WINDOW}]))"


def quantile(share: float, histogram: str, by: str = "") -> str:
    """Of a histogram, where anything was observed: otherwise it would be no number."""
    both = f"le,{by}" if by else "le"
    rate = per_second(f"{histogram}_bucket", both)
    return f"histogram_quantile({share}, {rate}) >= 0"


def share(part: str, whole: str) -> str:
    """Of two speeds; 0 while both are."""
    return f"({part} or vector(0)) / clamp_min({whole} or vector(0), 1e-9)"


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""
