"""Figures of several real processes, one of them killed, in one scrape."""

import http.server
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from longreach.cluster import metrics as m
from longreach.cluster.metrics.exporter import export
from longreach.engine.errors import ConfigurationError

from ...prometheus import free_port, prometheus_server, wait_for_value

WRITER = """
import sys, pathlib, signal
from longreach.cluster import metrics as m
metrics = m.Metrics(pathlib.Path(sys.argv[1]), role="decode", model_name="pocket")
metrics.add(m.GENERATION_TOKENS, 5)
metrics.set(m.NUM_REQUESTS_RUNNING, 2)
metrics.set(m.KV_CACHE_USAGE, float(sys.argv[2]))
metrics.observe(m.TIME_TO_FIRST_TOKEN, 1.5, prompt_class="32k")
print("written", flush=True)
signal.pause()
"""


@pytest.fixture
def start_writer(tmp_path: Path) -> Iterator:
    writers: list[subprocess.Popen[str]] = []

    def start(usage: float) -> subprocess.Popen[str]:
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(usage)],
            stdout=subprocess.PIPE,
            text=True,
        )
        writers.append(writer)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        return writer

    yield start
    for writer in writers:
        writer.kill()
        writer.communicate()


def samples(directory: Path) -> dict[tuple[str, str], float]:
    """What a scrape says: (name, the label that tells series apart) -> value."""
    found = {}
    for family in text_string_to_metric_families(m.render(directory).decode()):
        for sample in family.samples:
            extra = [v for k, v in sample.labels.items() if k not in m.COMMON_LABELS]
            found[sample.name, ",".join(sorted(extra))] = sample.value
    return found


def test_counts_outlive_a_killed_process_and_gauges_do_not(tmp_path: Path, start_writer) -> None:
    start_writer(0.25)
    victim = start_writer(0.75)
    both = samples(tmp_path)
    assert both["longreach_generation_tokens_total", ""] == 10
    assert both["longreach_num_requests_running", ""] == 4
    assert both["longreach_kv_cache_usage_perc", ""] == 0.75

    victim.send_signal(signal.SIGKILL)
    victim.wait()
    left = samples(tmp_path)
    assert left["longreach_generation_tokens_total", ""] == 10
    assert left["longreach_time_to_first_token_seconds_count", "32k"] == 2
    assert left["longreach_time_to_first_token_seconds_sum", "32k"] == 3.0
    assert left["longreach_num_requests_running", ""] == 2
    assert left["longreach_kv_cache_usage_perc", ""] == 0.25

    start_writer(0.5)
    assert samples(tmp_path)["longreach_generation_tokens_total", ""] == 15


def test_gauges_that_are_each_process_s_own_are_series_of_their_own(tmp_path: Path) -> None:
    """And go with their process, so no series is left of those that were."""
    fill = m.Gauge("engine:fill", "Share in use.", merge="all")

    def told() -> list[float]:
        return sorted(value for (name, _), value in samples(tmp_path).items() if name == fill.name)

    with m.Metrics(tmp_path, role="decode", model_name="pocket") as first:
        first.set(fill, 0.5)
        with m.Metrics(tmp_path, role="decode", model_name="pocket") as second:
            second.set(fill, 0.25)
            first.set(fill, 0.75)
            assert told() == [0.25, 0.75]
        assert told() == [0.75]
    assert told() == []


def test_histogram_buckets_are_cumulative_and_complete(tmp_path: Path) -> None:
    with m.Metrics(tmp_path, role="prefill", model_name="pocket") as metrics:
        for seconds in (0.0004, 0.0005, 0.01, 3600.0):
            metrics.observe(m.RANK_SKEW, seconds)
        found = samples(tmp_path)
    buckets = [found["longreach_rank_skew_seconds_bucket", f"{b}"] for b in m.RANK_SKEW.buckets]
    assert buckets == sorted(buckets)
    assert buckets[0] == 2
    assert buckets[-1] == 3
    assert found["longreach_rank_skew_seconds_bucket", "+Inf"] == 4
    assert found["longreach_rank_skew_seconds_count", ""] == 4


def test_scrapes_while_threads_write_lose_nothing(tmp_path: Path) -> None:
    with m.Metrics(tmp_path, role="ingress", model_name="pocket") as metrics:

        def write(thread: int) -> None:
            for step in range(300):
                metrics.add(m.REQUESTS, outcome="success")
                # New series make the file grow past its first size while it is read.
                metrics.add(m.PREFILL_STAGE_SECONDS, 0.5, stage=f"{thread}-{step}")

        with ThreadPoolExecutor(6) as pool:
            writes = [pool.submit(write, thread) for thread in range(4)]
            scrapes = [pool.submit(samples, tmp_path) for _ in range(6)]
            for done in (*writes, *scrapes):
                done.result()
        assert samples(tmp_path)["longreach_requests_total", "success"] == 1200
    totals = [scrape.result().get(("longreach_requests_total", "success"), 0) for scrape in scrapes]
    assert all(0 <= total <= 1200 for total in totals)


def test_two_scrapes_at_once_both_forget_a_dead_gauge(tmp_path: Path) -> None:
    metrics = m.Metrics(tmp_path, role="decode", model_name="pocket")
    metrics.set(m.NUM_REQUESTS_RUNNING, 1)
    metrics.add(m.GENERATION_TOKENS, 1)
    metrics.close()
    with ThreadPoolExecutor(8) as pool:
        for scrape in pool.map(samples, [tmp_path] * 16):
            assert ("longreach_num_requests_running", "") not in scrape
            assert scrape["longreach_generation_tokens_total", ""] == 1
    with pytest.raises(ValueError, match="closed"):
        metrics.add(m.GENERATION_TOKENS, 1)


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    with m.Metrics(tmp_path, role="ingress", model_name="pocket") as metrics:
        with pytest.raises(ValueError, match="only grow"):
            metrics.add(m.PROMPT_TOKENS, -1)
        with pytest.raises(ValueError, match="has labels"):
            metrics.add(m.REQUESTS)
        with pytest.raises(ValueError, match="has labels"):
            metrics.observe(m.E2E_REQUEST_LATENCY, 1.0, prompt="8k")
        metrics.observe(m.E2E_REQUEST_LATENCY, 1.0, prompt_class="8k")


def test_an_empty_or_missing_folder_is_an_empty_scrape(tmp_path: Path) -> None:
    assert m.render(tmp_path) == b""
    assert m.render(tmp_path / "not yet") == b""


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(1, "8k"), (8192, "8k"), (8193, "32k"), (131072, "128k"), (524288, "512k"), (524289, "1m")],
)
def test_prompt_class(tokens: int, name: str) -> None:
    assert m.prompt_class(tokens) == name


def test_an_exporter_answers_for_every_folder_below_and_outlives_the_writers(
    tmp_path: Path, start_writer
) -> None:
    """As Prometheus asks, while processes come and go."""
    port = free_port()
    server, thread = export(tmp_path, "127.0.0.1", port)
    try:
        assert scraped(port) == {}
        with m.Metrics(tmp_path / "node", role="decode", model_name="pocket") as metrics:
            metrics.add(m.GENERATION_TOKENS, 3)
            start_writer(0.25)
            assert scraped(port)["longreach_generation_tokens_total"] == 8
        assert scraped(port)["longreach_generation_tokens_total"] == 8
        with pytest.raises(ConfigurationError, match=f"port {port}"):
            export(tmp_path, "127.0.0.1", port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_names_of_engines_keep_their_colon_however_they_are_asked_for(
    tmp_path: Path, host: str
) -> None:
    port = free_port()
    server, thread = export(tmp_path, host, port)
    said = m.Counter("engine:said_total", "Tokens.")
    try:
        with m.Metrics(tmp_path, role="decode", model_name="pocket") as metrics:
            metrics.add(said, 3)
            # As Prometheus asks.
            asked = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
            assert scraped(port, host, Accept=asked) == {"engine:said_total": 3}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


NAMES = {"both.example": ["::1", "127.0.0.1"], "elsewhere.example": ["192.0.2.1", "127.0.0.1"]}
"""Of hosts in a resolver of our own; the first of the second is no address of this machine."""


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *given: Any, **named: Any) -> list[Any]:
        return [
            each for name in NAMES.get(host, [host]) for each in real(name, port, *given, **named)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    ("host", "asked"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("localhost", "localhost"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("::", "::1"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("both.example", "::1"),
        ("elsewhere.example", "127.0.0.1"),
    ],
)
def test_an_exporter_listens_at_names_and_addresses_of_either_kind(
    tmp_path: Path, host: str, asked: str
) -> None:
    port = free_port()
    server, thread = export(tmp_path, host, port)
    try:
        assert scraped(port, asked) == {}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    "host", ["[127.0.0.1]", "[::1", "::1]", "1:2", "192.0.2.1", "no such host", "[]"]
)
def test_a_host_that_is_none_of_this_machines_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigurationError, match="--host"):
        export(tmp_path, host, free_port())


def scraped(port: int, host: str = "127.0.0.1", **headers: str) -> dict[str, float]:
    named = f"[{host}]" if ":" in host else host
    asked = urllib.request.Request(f"http://{named}:{port}/metrics", headers=headers)
    with urllib.request.urlopen(asked) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_a_process_tells_what_it_takes(tmp_path: Path) -> None:
    with m.Metrics(tmp_path, role="decode", model_name="pocket") as sink:
        figures = m.ProcessFigures(sink, seconds=0.05)
        figures.start()
        held = np.ones(8 << 20, dtype=np.int64)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            found = samples(tmp_path)
            if found["longreach_process_resident_memory_bytes", ""] > held.nbytes:
                break
        figures.close()
        found = samples(tmp_path)
    own = psutil.Process()
    assert found["longreach_processes", ""] == 1
    assert found["longreach_process_start_time_seconds", ""] == own.create_time()
    assert held.nbytes < found["longreach_process_resident_memory_bytes", ""]
    assert 0 < found["longreach_process_cpu_seconds_total", ""] <= sum(own.cpu_times()[:2])
    versions = ",".join(sorted(version(name) for name in ("longreach", "ray", "torch")))
    assert found["longreach_build_info", versions] == 1


@pytest.fixture
def scrape_url(tmp_path: Path) -> Iterator[str]:
    """An HTTP endpoint that renders the test's folder at /metrics."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = m.render(tmp_path / "figures")
            self.send_response(200)
            self.send_header("Content-Type", m.CONTENT_TYPE)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def prometheus_url(tmp_path: Path, scrape_url: str) -> Iterator[str]:
    with prometheus_server(tmp_path, {"longreach": [scrape_url]}) as url:
        yield url


def test_a_real_prometheus_reads_what_was_written(tmp_path: Path, prometheus_url: str) -> None:
    folder = tmp_path / "figures"
    ingress = m.Metrics(folder, role="ingress", model_name="pocket")
    decode = m.Metrics(folder, role="decode", model_name="pocket")
    for seconds in (0.3, 3.0, 300.0):
        ingress.observe(m.TIME_TO_FIRST_TOKEN, seconds, prompt_class=m.prompt_class(1 << 20))
    ingress.add(m.REQUESTS, 3, outcome="success")
    decode.set(m.NUM_REQUESTS_RUNNING, 7)

    ttft = "longreach_time_to_first_token_seconds"
    wait_for_value(prometheus_url, f'{ttft}_count{{prompt_class="1m",role="ingress"}}', 3)
    wait_for_value(prometheus_url, f'{ttft}_sum{{model_name="pocket"}}', 303.3)
    wait_for_value(prometheus_url, f'{ttft}_bucket{{le="5.0"}}', 2)
    wait_for_value(prometheus_url, 'longreach_requests_total{outcome="success"}', 3)
    wait_for_value(prometheus_url, "longreach_num_requests_running", 7)

    decode.close()
    ingress.add(m.REQUESTS, 1, outcome="cancelled")
    wait_for_value(prometheus_url, "sum(longreach_requests_total)", 4)
    wait_for_value(prometheus_url, "count(longreach_num_requests_running) or vector(0)", 0)
    ingress.close()
