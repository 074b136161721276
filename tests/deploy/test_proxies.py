"""The examples for nginx and HAProxy, run by both, before two endpoints over a scripted model.

`make check-proxies` runs this. The files are those that are committed, but for ports and an hour
of silence, which is two seconds here: a prefill takes longer, and its progress keeps the stream up.
"""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from longreach.cluster.rest import SignsOfLife, build_refusal

from ..cluster.rest.backend import LIMITS, MODEL, Endpoint
from ..cluster.rest.server import serving, wait_for
from ..prometheus import free_port

pytestmark = pytest.mark.live

PROXIES = Path(__file__).parents[2] / "deploy" / "proxies"
SILENCE = "2s"
"""Longer than between two words of progress, and shorter than a prefill."""
BODY_BYTES = 6_000_000
"""Of the text of a million tokens."""


@dataclass
class Cluster:
    """An endpoint that may be told to drain: it finishes what it has and refuses what comes."""

    endpoint: Endpoint
    drains: bool = False
    asked: list[tuple[str, str]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append((scope.get("method", ""), scope.get("path", "")))
        app = build_refusal() if self.drains else self.endpoint.api
        await app(scope, receive, send)


@dataclass
class Setup:
    url: str
    clusters: list[Cluster]

    @property
    def closed(self) -> int:
        return sum(len(cluster.endpoint.backend.closed) for cluster in self.clusters)

    def ask(self, prompt: str = "Well?", **fields: object) -> httpx.Response:
        body = {"model": MODEL, "prompt": prompt, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=180)


@pytest.fixture(params=["nginx", "haproxy"])
def setup(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Setup]:
    binary = shutil.which(request.param) or shutil.which(request.param, path="/usr/sbin")
    if binary is None:
        pytest.skip(f"no {request.param} here; Debian has a package of that name")
    limits = replace(
        LIMITS, max_model_len=8_000_000, max_body_bytes=64 << 20, signs_of_life=SignsOfLife(0.5)
    )
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    clusters = [Cluster(Endpoint(folder, limits=limits)) for folder in folders]
    with ExitStack() as running:
        ports = [running.enter_context(serving(cluster)) for cluster in clusters]
        front = free_port()
        silence = SILENCE if "timeout" in request.node.name else "3600s"
        process = running.enter_context(
            subprocess.Popen(command(request.param, binary, tmp_path, front, ports, silence))
        )
        url = f"http://127.0.0.1:{front}"
        try:
            wait_for(lambda: answers(url), 20)
            yield Setup(url, clusters)
        finally:
            process.terminate()


def command(
    name: str, binary: str, folder: Path, front: int, ports: list[int], silence: str
) -> list[str]:
    suffix = "conf" if name == "nginx" else "cfg"
    text = (PROXIES / f"{name}.{suffix}").read_text()
    for written, used in ((8080, front), (8001, ports[0]), (8002, ports[1])):
        assert f"127.0.0.1:{written}" in text
        text = text.replace(f"127.0.0.1:{written}", f"127.0.0.1:{used}")
    assert "3600s" in text
    text = text.replace("3600s", silence).replace("/tmp/longreach-nginx", str(folder / "nginx"))
    path = folder / f"proxy.{suffix}"
    path.write_text(text)
    if name == "nginx":
        return [binary, "-c", str(path), "-g", "daemon off;"]
    return [binary, "-f", str(path), "-db"]


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


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


def test_the_text_of_a_million_tokens_comes_through_whole(setup: Setup) -> None:
    prompt = "word " * (BODY_BYTES // 5)
    answer = setup.ask(prompt)
    assert answer.status_code == 200, answer.text[:300]
    (request,) = [each for one in setup.clusters for each in one.endpoint.backend.requests]
    assert answer.json()["usage"]["prompt_tokens"] == len(request.prompt)
    assert setup.clusters[0].endpoint.tokenizer.decode(request.prompt.tolist()) == prompt


def test_who_leaves_is_noticed_behind_the_proxy(setup: Setup) -> None:
    for cluster in setup.clusters:
        cluster.endpoint.backend.prefill_seconds = 60
    body = {"model": MODEL, "prompt": "Well?", "stream": True}
    with httpx.stream("POST", f"{setup.url}/v1/completions", json=body, timeout=30) as answer:
        next(answer.iter_lines())
        assert setup.closed == 0
    wait_for(lambda: setup.closed == 1, 3)


def test_a_cluster_that_drains_under_load_loses_no_request(setup: Setup) -> None:
    for cluster in setup.clusters:
        cluster.endpoint.backend.prefill_seconds = 0.3
    draining, other = setup.clusters
    enough = threading.Event()
    statuses: list[int] = []

    def client() -> None:
        while not enough.is_set():
            statuses.append(setup.ask().status_code)

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client) for _ in range(8)]
        try:
            wait_for(lambda: len(draining.endpoint.backend.requests) >= 4, 30)
            draining.drains = True
            before = len(other.endpoint.backend.requests)
            wait_for(lambda: len(other.endpoint.backend.requests) >= before + 24, 30)
        finally:
            enough.set()
        for done in clients:
            done.result()
    assert set(statuses) == {200}
    served = sum(len(cluster.endpoint.backend.requests) for cluster in setup.clusters)
    assert served == len(statuses) == setup.closed


def test_health_is_asked_by_get(setup: Setup) -> None:
    time.sleep(1.5)
    asked = {each for cluster in setup.clusters for each in cluster.asked}
    assert asked <= {("GET", "/ready")}
