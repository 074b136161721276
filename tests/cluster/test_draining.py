"""A node that is about to go waits for what is under way on it, and for its proxy's clients."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from starlette.requests import Request
from starlette.responses import StreamingResponse

from longreach.cluster import draining
from longreach.cluster import metrics as m
from longreach.cluster.draining import has_clients, has_work, wait_until_idle
from longreach.cluster.front import FrontLimits, controller_options, depart

from ..prometheus import free_port
from .conftest import wait_for

IDLE = 20
"""Connections, of which each proxy has some: the kernel deals them out."""
ANSWER_SECONDS = 12
"""More than the looks take in which an idle node must be quiet."""


@pytest.mark.parametrize(
    ("gauge", "value"),
    [
        (m.NUM_REQUESTS_RUNNING, 1),
        (m.NUM_REQUESTS_WAITING, 1),
        (m.NUM_SEQUENCES_WAITING, 1),
        (m.NUM_PROMPTS, 1),
        (m.KV_CACHE_USAGE, 0.01),  # all that a prompt which another node computes has here
    ],
)
def test_it_waits_for_what_any_role_has_under_way(
    tmp_path: Path, gauge: m.Gauge, value: float
) -> None:
    is_busy = partial(has_work, tmp_path)
    with m.Metrics(tmp_path, role="decode", model_name="pocket") as decode:
        decode.set(gauge, value)
        assert not wait_until_idle(is_busy, time.time() + 0.2, look_seconds=0.01)
        threading.Timer(0.3, decode.set, (gauge, 0)).start()
        began = time.time()
        assert wait_until_idle(is_busy, began + 10, look_seconds=0.01)
        assert time.time() - began >= 0.3


def test_a_node_without_figures_is_idle_and_one_in_time_trouble_is_not(tmp_path: Path) -> None:
    is_busy = partial(has_work, tmp_path / "none")
    assert wait_until_idle(is_busy, time.time() + 10, look_seconds=0.001)
    assert not wait_until_idle(is_busy, time.time() - 1)


@pytest.mark.parametrize(
    ("said", "has"),
    [
        (1, True),
        (0, False),
        (GetTimeoutError(), True),  # it hangs, or has much to do
        (ActorUnavailableError("out of reach", b"1" * 16), True),
        (RayActorError(), False),
        (RayError("a proxy of another version"), False),
        (ValueError("no actor of that name"), False),
    ],
)
def test_a_proxy_has_clients_while_it_may_have(
    monkeypatch: pytest.MonkeyPatch, said: int | Exception, has: bool
) -> None:
    def get(*_: object, **__: object) -> int:
        if isinstance(said, Exception):
            raise said
        return said

    asked: list[object] = []
    proxy = SimpleNamespace(__ray_call__=SimpleNamespace(remote=asked.append))
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: proxy)
    monkeypatch.setattr(ray, "get", get)
    assert has_clients("a node") is has
    assert asked == [depart]


class Slow:
    """Answers a second at a time."""

    async def __call__(self, request: Request) -> StreamingResponse:
        async def seconds() -> AsyncIterator[str]:
            for _ in range(int(request.query_params.get("seconds", 0))):
                yield "tick "
                await asyncio.sleep(1)
            yield "done"

        return StreamingResponse(seconds(), media_type="text/plain")


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """The URL of what the head's replica answers, and the id of another node that has a proxy."""
    port = free_port()
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"head": 1}}
    )
    try:
        other = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.2", resources={"other": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(
            proxy_location=ProxyLocation.EveryNode,
            http_options=HTTPOptions(host="127.0.0.1", port=port),
            controller_options=controller_options(FrontLimits(1 << 20, 60.0)),
        )
        for name in ("head", "other"):
            on_a_node = {"num_cpus": 0, "resources": {name: 0.1}}
            slow = serve.deployment(ray_actor_options=on_a_node)(Slow)
            serve.run(slow.bind(), name=name, route_prefix=f"/{name}")
        yield f"http://127.0.0.1:{port}/head", other.node_id
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.live
def test_clients_of_its_proxy_are_waited_for_and_seen_off(
    nodes: tuple[str, str], tmp_path: Path
) -> None:
    """Other nodes work on their requests. All proxies of a machine share a port; so clients come
    until one has its connection at the proxy that goes.
    """
    url, leaving = nodes
    here = NodeAffinitySchedulingStrategy(leaving, soft=False)
    leave: Any = ray.remote(num_cpus=0)(draining.leave).options(scheduling_strategy=here)
    with ExitStack() as clients:
        idle = [clients.enter_context(connected(url)) for _ in range(IDLE)]
        answer = client_at(leaving, url, clients)
        left = leave.remote(tmp_path, time.time() + 60)
        text = "".join(answer.iter_text())
        assert text.endswith("done")
        assert not ray.wait([left], timeout=0)[0], "the node would have ended under its client"
        closed = sum(map(is_closed, idle))
        assert 0 < closed < IDLE, "those at the proxy that goes, and no others"
        assert ray.get(left, timeout=30) is True
        assert httpx.get(url).text == "done"


def connected(url: str) -> socket.socket:
    """A connection that has had an answer, and is kept."""
    there = httpx.URL(url)
    connection = socket.create_connection((there.host, there.port), timeout=30)
    connection.sendall(f"GET {there.path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    said = b""
    while not said.endswith(b"0\r\n\r\n"):
        said += connection.recv(1 << 16)
    connection.settimeout(0.1)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has."""
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False


def client_at(node: str, url: str, clients: ExitStack) -> httpx.Response:
    """The answer to one whose connection is at this node's proxy, from its second piece on."""
    for _ in range(50):
        with ExitStack() as tried:
            client = tried.enter_context(httpx.Client(timeout=60))
            answer = tried.enter_context(
                client.stream("GET", url, params={"seconds": ANSWER_SECONDS})
            )
            if has_clients(node):
                clients.push(tried.pop_all())
                return answer
        wait_for(lambda: not has_clients(node), 30, "the others have left")
    raise AssertionError("no connection comes to it")
