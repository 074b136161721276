"""Prometheus metrics of all processes of a node, in one scrape that outlives any of them.

Every process keeps its figures in memory-mapped files of one shared folder (prometheus-client's
multiprocess format); `render` adds them up. What a dead process counted stays counted, what it
gauged is gone with it.

prometheus-client picks its multiprocess mode from an environment variable when it is first
imported, which Ray does before any of our code runs. So the files are opened here, explicitly:
nothing depends on the environment, on import order or on a process-wide registry.
"""

import fcntl
import os
import secrets
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

Role = Literal["ingress", "prefill", "decode"]
COMMON_LABELS = ("model_name", "role")

_PROMPT_CLASSES = ((8192, "8k"), (32768, "32k"), (131072, "128k"), (524288, "512k"))


def prompt_class(prompt_tokens: int) -> str:
    """The label of the smallest class that holds a prompt: 8k, 32k, 128k, 512k or 1m."""
    return next((name for limit, name in _PROMPT_CLASSES if prompt_tokens <= limit), "1m")


@dataclass(frozen=True)
class Counter:
    """Something that only grows. `labels` come on top of COMMON_LABELS."""

    name: str
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gauge:
    """Something measured now. `merge` says how the figures of several processes become one."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    merge: Literal["sum", "max"] = "sum"


@dataclass(frozen=True)
class Histogram:
    """A distribution; `buckets` are upper bounds, without the infinite one."""

    name: str
    help: str
    buckets: tuple[float, ...]
    labels: tuple[str, ...] = ()


Metric = Counter | Gauge | Histogram

# From an ingress's overhead to a million tokens on a small machine, twice as wide at each step.
_REQUEST_SECONDS = (
    0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
    160.0, 320.0, 640.0, 1280.0, 2560.0,
)  # fmt: skip
_SHORT_SECONDS = (
    0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0,
)  # fmt: skip
_TOKENS_PER_SECOND = tuple(float(100 * 2**step) for step in range(16))

REQUESTS = Counter(
    "longreach_requests_total",
    "Requests by how they ended: success, invalid (4xx), rejected (429), cancelled by the client, "
    "or failed.",
    ("outcome",),
)
REQUEST_SUCCESS = Counter(
    "longreach_request_success_total",
    "Choices of successful requests by why they ended: stop or length.",
    ("finished_reason",),
)
PROMPT_TOKENS = Counter(
    "longreach_prompt_tokens_total", "Prompt tokens of requests whose prefill ended well."
)
GENERATION_TOKENS = Counter("longreach_generation_tokens_total", "Tokens generated.")
TIME_TO_FIRST_TOKEN = Histogram(
    "longreach_time_to_first_token_seconds",
    "From a request's arrival to its first token.",
    _REQUEST_SECONDS,
    ("prompt_class",),
)
INTER_TOKEN_LATENCY = Histogram(
    "longreach_inter_token_latency_seconds",
    "Between one token of a choice and its next.",
    _SHORT_SECONDS,
    ("prompt_class",),
)
E2E_REQUEST_LATENCY = Histogram(
    "longreach_e2e_request_latency_seconds",
    "From a successful request's arrival to the end of its answer.",
    _REQUEST_SECONDS,
    ("prompt_class",),
)
REQUEST_QUEUE_TIME = Histogram(
    "longreach_request_queue_time_seconds",
    "From a request's arrival to the start of its first chunk.",
    _REQUEST_SECONDS,
    ("prompt_class",),
)
REQUEST_PREFILL_TIME = Histogram(
    "longreach_request_prefill_time_seconds",
    "From the start of a request's first chunk to the end of its last.",
    _REQUEST_SECONDS,
    ("prompt_class",),
)
REQUEST_HANDOFF_TIME = Histogram(
    "longreach_request_handoff_time_seconds",
    "From the end of a request's last chunk until all its pages lay in the decode replica: the "
    "part of the hand-off that computing did not hide.",
    _REQUEST_SECONDS,
    ("prompt_class",),
)
PREFILL_TOKENS_PER_SECOND = Histogram(
    "longreach_prefill_tokens_per_second",
    "Prompt tokens of one request over its prefill time.",
    _TOKENS_PER_SECOND,
    ("prompt_class",),
)
HANDOFF_BYTES = Counter(
    "longreach_handoff_bytes_total", "Bytes of KV pages that reached a decode replica."
)
PREFILL_CHUNKS = Counter("longreach_prefill_chunks_total", "Chunks computed by prefill gangs.")
PREFILL_TOKENS = Counter(
    "longreach_prefill_tokens_total",
    "Prompt tokens computed by prefill gangs, those of requests that were cancelled later too.",
)
PREFILL_STAGE_SECONDS = Counter(
    "longreach_prefill_stage_seconds_total",
    "Where the time of prefill chunks went, on the slowest rank of each chunk.",
    ("stage",),
)
RANK_SKEW = Histogram(
    "longreach_rank_skew_seconds",
    "How much longer the slowest rank of a gang computed one chunk than the fastest.",
    _SHORT_SECONDS,
)
DECODE_STEP_TIME = Histogram(
    "longreach_decode_step_time_seconds",
    "One step of the decode engine: one token for every sequence in the batch.",
    _SHORT_SECONDS,
)
NUM_REQUESTS_RUNNING = Gauge(
    "longreach_num_requests_running", "Requests that this role is working on."
)
NUM_REQUESTS_WAITING = Gauge(
    "longreach_num_requests_waiting", "Requests that wait for this role to begin on them."
)
NUM_SEQUENCES_WAITING = Gauge(
    "longreach_num_sequences_waiting",
    "Sequences whose prompt is prefilled and that wait for a place in the batch.",
)
KV_CACHE_USAGE = Gauge(
    "longreach_kv_cache_usage_perc",
    "Share of KV pages in use, 0 to 1, in the fullest pool of this role.",
    merge="max",
)

VOCABULARY: tuple[Metric, ...] = (
    REQUESTS,
    REQUEST_SUCCESS,
    NUM_REQUESTS_RUNNING,
    NUM_REQUESTS_WAITING,
    NUM_SEQUENCES_WAITING,
    PROMPT_TOKENS,
    GENERATION_TOKENS,
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    E2E_REQUEST_LATENCY,
    REQUEST_QUEUE_TIME,
    REQUEST_PREFILL_TIME,
    REQUEST_HANDOFF_TIME,
    HANDOFF_BYTES,
    PREFILL_TOKENS_PER_SECOND,
    PREFILL_TOKENS,
    PREFILL_CHUNKS,
    PREFILL_STAGE_SECONDS,
    RANK_SKEW,
    DECODE_STEP_TIME,
    KV_CACHE_USAGE,
)


class Metrics:
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
        self._sheets: dict[str, _Sheet] = {}
        self._series: dict[tuple[str, str, tuple[tuple[str, str], ...]], str] = {}
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
        bound = next((bound for bound in metric.buckets if value <= bound), float("inf"))
        with self._lock:
            sheet = self._sheet("histogram")
            if self._is_new(metric, labels):
                self._open_buckets(sheet, metric, labels)
            sheet.add(self._key(metric, metric.name, f"{metric.name}_sum", labels), value)
            sheet.add(self._bucket_key(metric, bound, labels), 1)

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

    def _sheet(self, kind: str) -> "_Sheet":
        if self._closed:
            raise ValueError("these metrics are closed; make new ones")
        if kind not in self._sheets:
            self._sheets[kind] = _Sheet(self._directory / f"{kind}_{self._identity}.db")
        return self._sheets[kind]

    def _is_new(self, metric: Histogram, labels: dict[str, str]) -> bool:
        return (metric.name, f"{metric.name}_sum", tuple(labels.items())) not in self._series

    def _open_buckets(self, sheet: "_Sheet", metric: Histogram, labels: dict[str, str]) -> None:
        """Write every bucket once, so that empty ones show as well."""
        for bound in (*metric.buckets, float("inf")):
            sheet.add(self._bucket_key(metric, bound, labels), 0)

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


class _Sheet:
    """One file of one writer. Whoever may lock it knows that its writer is gone.

    The kernel drops the lock however a process ends, so nobody has to notice deaths, and a
    process id that is used again confuses nobody.
    """

    def __init__(self, path: Path) -> None:
        # Readers must never meet a file that is empty yet or not locked yet.
        unfinished = path.with_suffix(".new")
        self._values = MmapedDict(str(unfinished))
        self._held = _lock(unfinished, fcntl.LOCK_EX)
        unfinished.rename(path)

    def add(self, key: str, amount: float) -> None:
        value, _ = self._values.read_value(key)
        self._values.write_value(key, value + amount, 0.0)

    def set(self, key: str, value: float) -> None:
        self._values.write_value(key, value, 0.0)

    def close(self) -> None:
        self._values.close()
        if self._held is not None:
            self._held.close()


def _lock(path: Path, kind: int) -> IO[bytes] | None:
    """Lock a file until the returned handle is closed, or None when another holds it."""
    handle = path.open("rb")
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle


def render(directory: Path) -> bytes:
    """What every process has written to the folder so far, as Prometheus's text (CONTENT_TYPE)."""
    registry = CollectorRegistry()
    registry.register(_Folder(directory))
    return generate_latest(registry)


class _Folder(Collector):
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterable[Family]:
        _forget_gauges_of_the_dead(self._directory)
        files = [str(path) for path in sorted(self._directory.glob("*.db"))]
        return sorted(MultiProcessCollector.merge(files), key=lambda family: family.name)


def _forget_gauges_of_the_dead(directory: Path) -> None:
    for path in directory.glob("gauge_*.db"):
        try:
            # Shared: of two scrapes at once, each must see that nobody holds the file.
            handle = _lock(path, fcntl.LOCK_SH)
        except FileNotFoundError:
            continue  # another scrape was faster
        if handle is not None:
            handle.close()
            path.unlink(missing_ok=True)
