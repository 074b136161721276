"""What a process writes its figures with."""

import os
import secrets
import threading
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from prometheus_client.mmap_dict import mmap_key
from prometheus_client.utils import floatToGoString

from ...engine.figures import Counter, Figures, Gauge, Histogram, Metric
from .sheet import Sheet
from .vocabulary import Role


@dataclass(frozen=True)
class _HistogramKeys:
    """The texts that name a histogram's series in a file; the last bucket is the infinite one."""

    sum: str
    buckets: tuple[str, ...]


class Metrics(Figures):
    """One writer of figures. Safe to use from several threads, not across a fork.

        metrics = Metrics(directory, role="decode", model_name="longreach-pocket")
        metrics.observe(TIME_TO_FIRST_TOKEN, seconds, prompt_class=prompt_class(tokens))
        metrics.add(GENERATION_TOKENS, 3)
        metrics.set(KV_CACHE_USAGE, pool.used / pool.num_pages)

    A process usually has one, and keeps it as long as it lives; several do no harm.

    Args:
        gang: the name of the gang that a prefill replica coordinates, if it has one; a label of
            all its figures.
    """

    def __init__(
        self, directory: Path, role: Role, model_name: str, gang: str | None = None
    ) -> None:
        self._directory = directory
        self._common = {"model_name": model_name, "role": role}
        if gang is not None:
            self._common["gang"] = gang
        # The process id is for people who look into the folder; the token makes it unique, even
        # when containers with process ids of their own share the folder.
        self._identity = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._lock = threading.Lock()
        self._closed = False
        self._sheets: dict[str, Sheet] = {}
        self._series: dict[tuple[str, str, tuple[tuple[str, str], ...]], str] = {}
        self._histograms: dict[tuple[str, tuple[tuple[str, str], ...]], _HistogramKeys] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, metric: Counter, amount: float = 1, **labels: str) -> None:
        """Count `amount` more."""
        if amount < 0:
            raise ValueError(f"{metric.name} can only grow, not by {amount}")
        with self._lock:
            sheet = self._sheet("counter")
            # The format calls a counter's family by its name without "_total".
            key = self._key(metric, metric.name.removesuffix("_total"), metric.name, labels)
            sheet.add(key, amount)

    def set(self, metric: Gauge, value: float, **labels: str) -> None:
        """Replace what this writer gauges."""
        with self._lock:
            sheet = self._sheet(f"gauge_live{metric.merge}")
            sheet.set(self._key(metric, metric.name, metric.name, labels), value)

    def observe(self, metric: Histogram, value: float, **labels: str) -> None:
        """Put one more value into a distribution."""
        with self._lock:
            sheet = self._sheet("histogram")
            keys = self._keys_of(sheet, metric, labels)
            sheet.add(keys.sum, value)
            sheet.add(keys.buckets[bisect_left(metric.buckets, value)], 1)

    def close(self) -> None:
        """Close the files: counts stay in the scrape, gauges leave it."""
        with self._lock:
            for sheet in self._sheets.values():
                sheet.close()
            self._sheets.clear()
            self._closed = True

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _sheet(self, kind: str) -> Sheet:
        if self._closed:
            raise ValueError("these metrics are closed; make new ones")
        if kind not in self._sheets:
            self._sheets[kind] = Sheet(self._directory / f"{kind}_{self._identity}.db")
        return self._sheets[kind]

    def _keys_of(self, sheet: Sheet, metric: Histogram, labels: dict[str, str]) -> "_HistogramKeys":
        """Made once for each series; every bucket is written then, so that empty ones show too."""
        series = (metric.name, tuple(labels.items()))
        keys = self._histograms.get(series)
        if keys is None:
            bounds = (*metric.buckets, float("inf"))
            buckets = tuple(self._bucket_key(metric, bound, labels) for bound in bounds)
            for each in buckets:
                sheet.add(each, 0)
            total = self._key(metric, metric.name, f"{metric.name}_sum", labels)
            keys = self._histograms[series] = _HistogramKeys(total, buckets)
        return keys

    def _bucket_key(self, metric: Histogram, bound: float, labels: dict[str, str]) -> str:
        bounded = {**labels, "le": floatToGoString(bound)}
        return self._key(metric, metric.name, f"{metric.name}_bucket", bounded)

    def _key(self, metric: Metric, family: str, sample: str, labels: dict[str, str]) -> str:
        """The text that names one series in a file; made once for each."""
        series = (metric.name, sample, tuple(labels.items()))
        key = self._series.get(series)
        if key is None:
            if {*labels} - {"le"} != {*metric.labels}:
                raise ValueError(f"{metric.name} has labels {metric.labels}, not {(*labels,)}")
            names = {**self._common, **labels}
            key = mmap_key(family, sample, [*names], [*names.values()], metric.help)
            self._series[series] = key
        return key
