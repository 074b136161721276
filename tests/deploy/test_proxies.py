"""The examples for nginx and HAProxy, run by both, before two endpoints over a scripted model.

`make check-proxies` runs this, and with ARGS=--record writes the table of docs/behind-a-proxy.md.
The files are those that are committed, but for ports and an hour of silence, which is two seconds
here: a prefill takes longer, and its progress keeps the stream up.
"""

import json
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from longreach.cluster.rest import SignsOfLife, build_refusal

from ..cluster.rest.backend import LIMITS, MODEL, Endpoint
from ..cluster.rest.server import serving, wait_for
from .proxies import PROXIES, proxy
from .table import Table

pytestmark = pytest.mark.live

PAGE = Path(__file__).parents[2] / "docs" / "behind-a-proxy.md"
SILENCE = "2s"
"""Longer than between two words of progress, and shorter than a prefill."""
BODY_BYTES = 6_000_000
"""Of the text of a million tokens."""


@dataclass
class Cluster:
    """An endpoint that may be told to drain: it finishes what it has and refuses what comes.

    A health check hears of it only when a request has: the worst that its pauses can do.
    """

    endpoint: Endpoint
    drains: bool = False
    refused: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope.get("method", "")
        self.asked.append((method, scope.get("path", "")))
        refuses = self.drains and (method == "POST" or self.refused > 0)
        self.refused += refuses and method == "POST"
        app = build_refusal() if refuses else self.endpoint.api
        await app(scope, receive, send)


@dataclass
class Setup:
    """A proxy in front of two clusters; `seen` takes what came through, by what was sent."""

    proxy: str
    url: str
    clusters: list[Cluster]
    seen: Table

    def saw(self, sent: str, came: str) -> None:
        """Keep a cell of the table."""
        self.seen.put(sent, self.proxy, came)

    @property
    def closed(self) -> int:
        return sum(len(cluster.endpoint.backend.closed) for cluster in self.clusters)

    def ask(self, prompt: str = "Well?", **fields: object) -> httpx.Response:
        body = {"model": MODEL, "prompt": prompt, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=180)

    def ask_slowly(self, seconds: float) -> httpx.Response:
        """The body comes so long after the headers."""
        body = json.dumps({"model": MODEL, "prompt": "Well?"}).encode()

        def later() -> Iterator[bytes]:
            time.sleep(seconds)
            yield body

        headers = {"content-type": "application/json", "content-length": str(len(body))}
        url = f"{self.url}/v1/completions"
        return httpx.post(url, content=later(), headers=headers, timeout=180)


@pytest.fixture(scope="module")
def seen(record: bool) -> Iterator[Table]:
    table = Table(PAGE, PROXIES, "make check-proxies")
    yield table
    if record:
        table.write()


@pytest.fixture(params=PROXIES)
def setup(request: pytest.FixtureRequest, tmp_path: Path, seen: Table) -> Iterator[Setup]:
    limits = replace(
        LIMITS, max_model_len=8_000_000, max_body_bytes=64 << 20, signs_of_life=SignsOfLife(0.5)
    )
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    clusters = [Cluster(Endpoint(folder, limits=limits)) for folder in folders]
    with ExitStack() as running:
        ports = [running.enter_context(serving(cluster)) for cluster in clusters]
        silence = SILENCE if "timeout" in request.node.name else None
        url = running.enter_context(proxy(request.param, tmp_path, ports, silence))
        yield Setup(request.param, url, clusters, seen)


def test_a_prefill_longer_than_any_timeout_is_streamed_as_it_goes(setup: Setup) -> None:
    for cluster in setup.clusters:
        cluster.endpoint.backend.prefill_seconds = 6
    body = {"model": MODEL, "prompt": "Well?", "stream": True}
    began = time.monotonic()
    with httpx.stream("POST", f"{setup.url}/v1/completions", json=body, timeout=30) as answer:
        lines = [(time.monotonic() - began, line) for line in answer.iter_lines() if line]
    assert lines[-1][1] == "data: [DONE]"
    assert lines[-1][0] > 6
    comments = [seconds for seconds, line in lines if line.startswith(":")]
    assert comments[0] < 2, "progress is not held back"
    assert len(comments) > 6
    text = "".join(
        json.loads(line[6:])["choices"][0]["text"]
        for _, line in lines
        if line.startswith("data: {") and json.loads(line[6:])["choices"]
    )
    assert text == "Yes."
    at = [seconds for seconds, _ in lines]
    silent = max(later - before for before, later in pairwise(at))
    setup.saw(
        "a stream with a prefill of 6 s, every idle timeout at two seconds",
        f"whole, and never silent for more than {silent:.1f} s",
    )


def test_the_text_of_a_million_tokens_comes_through_whole(setup: Setup) -> None:
    prompt = "word " * (BODY_BYTES // 5)
    answer = setup.ask(prompt)
    assert answer.status_code == 200, answer.text[:300]
    (request,) = [each for one in setup.clusters for each in one.endpoint.backend.requests]
    assert answer.json()["usage"]["prompt_tokens"] == len(request.prompt)
    assert setup.clusters[0].endpoint.tokenizer.decode(request.prompt.tolist()) == prompt
    setup.saw(
        f"{BODY_BYTES // 10**6} MB of text in one body",
        f"whole: {len(request.prompt):,} tokens of a byte each",
    )


def test_who_leaves_is_noticed_behind_the_proxy(setup: Setup) -> None:
    for cluster in setup.clusters:
        cluster.endpoint.backend.prefill_seconds = 60
    body = {"model": MODEL, "prompt": "Well?", "stream": True}
    with httpx.stream("POST", f"{setup.url}/v1/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()  # the connection is closed with it
        next(lines)
        assert setup.closed == 0
    left = time.monotonic()
    wait_for(lambda: setup.closed == 1, 3)
    setup.saw(
        "a client that leaves during a prefill of a minute",
        f"the endpoint stops within {math.ceil((time.monotonic() - left) * 10) / 10:.1f} s",
    )


def test_a_cluster_that_drains_under_load_loses_no_request(setup: Setup) -> None:
    for cluster in setup.clusters:
        cluster.endpoint.backend.prefill_seconds = 0.3
    draining, other = setup.clusters
    enough = threading.Event()
    statuses: list[int] = []

    def client() -> None:
        while not enough.is_set():
            statuses.append(setup.ask_slowly(0.05).status_code)

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client) for _ in range(8)]
        try:
            wait_for(lambda: len(draining.endpoint.backend.requests) >= 4, 30)
            draining.drains = True
            before = len(other.endpoint.backend.requests)
            wait_for(lambda: draining.refused > 0, 30)
            wait_for(lambda: len(other.endpoint.backend.requests) >= before + 24, 60)
        finally:
            enough.set()
        for done in clients:
            done.result()
    assert set(statuses) == {200}
    served = sum(len(cluster.endpoint.backend.requests) for cluster in setup.clusters)
    assert served == len(statuses) == setup.closed
    setup.saw(
        "eight clients all the time, one endpoint begins to drain",
        f"{len(statuses)} requests, all answered 200 and each computed once; {draining.refused} "
        "met the draining endpoint and went on to the other",
    )


def test_health_is_asked_by_get(setup: Setup) -> None:
    before = [len(cluster.asked) for cluster in setup.clusters]
    time.sleep(2)
    asked = [
        each
        for cluster, count in zip(setup.clusters, before, strict=True)
        for each in cluster.asked[count:]
    ]
    assert set(asked) <= {("GET", "/ready")}
    assert bool(asked) == (setup.proxy == "haproxy")
    setup.saw(
        "nothing, for two seconds",
        f"`GET /ready` {len(asked)} times, nothing else" if asked else "nothing: it asks nobody",
    )
