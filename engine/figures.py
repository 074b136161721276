"""What is counted and measured, and whoever keeps it: an engine has figures of its own to tell."""

from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Counter:
    """Something that only grows. `labels` come on top of those that all figures have."""

    name: str
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gauge:
    """Something measured now. `merge` says how the figures of several processes become one.

    With "all" they do not: each process's is a series of its own, with a label `pid`.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()
    merge: Literal["sum", "max", "all"] = "sum"


@dataclass(frozen=True)
class Histogram:
    """A distribution; `buckets` are upper bounds, without the infinite one."""

    name: str
    help: str
    buckets: tuple[float, ...]
    labels: tuple[str, ...] = ()


Metric = Counter | Gauge | Histogram


class Figures(Protocol):
    """Whoever keeps a process's figures. On any thread."""

    def add(self, metric: Counter, amount: float = 1, **labels: str) -> None:
        """Count `amount` more."""
        ...

    def set(self, metric: Gauge, value: float, **labels: str) -> None:
        """Replace what was gauged."""
        ...

    def observe(self, metric: Histogram, value: float, **labels: str) -> None:
        """Put one more value into a distribution."""
        ...
