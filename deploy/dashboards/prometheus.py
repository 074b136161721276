"""A Prometheus server, asked as Grafana asks it."""

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .panels import MODEL, WINDOW

_TIMEOUT_SECONDS = 30


class QueryError(Exception):
    """Prometheus does not answer, or does not understand a query; with what it said."""


@dataclass(frozen=True)
class Series:
    """`times` in seconds since 1970, and a value for each, which may be no number."""

    labels: Mapping[str, str]
    times: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def is_finite(self) -> bool:
        """Whether every value is a number that can be drawn."""
        return all(math.isfinite(value) for value in self.values)


@dataclass(frozen=True)
class Span:
    """From `start` to `end`, in seconds since 1970, with a value every `step` seconds."""

    start: float
    end: float
    step: float


class Prometheus:
    """Puts values in the place of Grafana's variables, and asks.

    Args:
        url: of the server.
        window: what Grafana puts for `$__rate_interval`: four scrapes or more.
        variables: of a dashboard's own, by their names with the dollar sign.
    """

    def __init__(self, url: str, window: str, variables: Mapping[str, str] | None = None) -> None:
        self._url = url.rstrip("/")
        self._variables = {MODEL: ".*", WINDOW: window, **(variables or {})}

    def over(self, expression: str, span: Span) -> list[Series]:
        """What a query gives over a time.

        Raises:
            QueryError: nobody answers, or the query is not valid.
        """
        found = self._ask(
            "query_range",
            {
                "query": self._filled(expression),
                "start": f"{span.start:.3f}",
                "end": f"{span.end:.3f}",
                "step": f"{span.step:g}",
            },
        )
        return [_series(each) for each in found]

    def _filled(self, expression: str) -> str:
        for name, value in self._variables.items():
            expression = expression.replace(name, value)
        return expression

    def _ask(self, path: str, arguments: Mapping[str, str]) -> list[dict[str, Any]]:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
                return json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise QueryError(error.read().decode(errors="replace")[:500]) from error
        except (OSError, ValueError, KeyError) as error:
            raise QueryError(f"{self._url} does not answer as Prometheus does: {error}") from error


def _series(result: Mapping[str, Any]) -> Series:
    times, values = zip(*result["values"], strict=True)
    return Series(result["metric"], tuple(times), tuple(float(value) for value in values))
