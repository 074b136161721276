"""Starting and stopping a cluster, with Ray and Serve replaced by what they would say."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import ray
from ray import serve
from ray.exceptions import RaySystemError

from longreach.cluster import app
from longreach.cluster.app import (
    LocalCluster,
    check_room,
    prefill_names,
    remove,
    start,
    startup_failure,
)
from longreach.cluster.local_ray import LocalRay
from longreach.cluster.port_claim import PortInUseError
from longreach.cluster.settings import PrefillSettings, Settings
from longreach.engine.errors import ConfigurationError

from ..prometheus import free_port
from .conftest import gangs_with, make_settings


class FakeRay:
    """In place of `LocalRay`: says what it was asked for."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def ended(self) -> str | None:
        return "Ray's raylet (process 7) ended" if "raylet ends" in self._calls else None

    def silent(self) -> list[str]:
        return []

    def stop(self) -> None:
        self._calls.append("ray.stop")

    def kill(self) -> None:
        self._calls.append("ray.kill")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called, in order."""
    made: list[str] = []
    monkeypatch.setattr(LocalRay, "start", lambda: FakeRay(made))
    monkeypatch.setattr(serve, "run_many", lambda *_, **__: made.append("serve.run_many"))
    return made


@pytest.fixture
def claim() -> Iterator[socket.socket]:
    with socket.socket() as made:
        yield made


def make_cluster(calls: list[str], folder: Path, claim: socket.socket) -> LocalCluster:
    return LocalCluster(make_settings(1), folder, cast(LocalRay, FakeRay(calls)), claim)


def test_draining_may_take_longer_than_serve_waits(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, claim: socket.socket
) -> None:
    """`serve.delete` gives up after a minute, whatever a deployment's own limit."""

    def delete(name: str) -> None:
        calls.append("serve.delete")
        if len(calls) < 4:
            raise TimeoutError("not deleted after 60s")

    monkeypatch.setattr(serve, "delete", delete)
    make_cluster(calls, tmp_path, claim).stop()
    assert calls == ["serve.run_many", *["serve.delete"] * 3, "ray.stop"]


def test_where_the_whole_cluster_stops_nobody_waits_for_what_could_go_on(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode replicas and ingresses would, for gangs that come in place of others."""
    ended = threading.Event()
    names = {
        "SERVE_REPLICA::longreach#ingress#1": "serve",
        "SERVE_REPLICA::other#ingress#2": "serve",
    }
    names |= {"SERVE_REPLICA::longreach#decode#3": "elsewhere", "longreach-decode-4": "serve"}

    def delete(name: str) -> None:
        assert ended.wait(10)

    def kill(actor: str) -> None:
        calls.append(actor)
        ended.set()

    listed = [{"name": name, "namespace": namespace} for name, namespace in names.items()]
    monkeypatch.setattr(serve, "delete", delete)
    monkeypatch.setattr(ray.util, "list_named_actors", lambda all_namespaces: listed)
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: name)
    monkeypatch.setattr(ray, "kill", kill)
    remove(drain_seconds=0.05)
    assert calls == ["serve.run_many", "SERVE_REPLICA::longreach#ingress#1"]


def test_who_has_left_ray_while_it_drained_cuts_nothing_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The timer may be a moment late."""

    def left(all_namespaces: bool) -> list[dict[str, str]]:
        raise RaySystemError("Ray has not been started yet")

    monkeypatch.setattr(ray.util, "list_named_actors", left)
    app._cut_off()


def test_a_cluster_that_cannot_announce_its_end_still_drains(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    claim: socket.socket,
) -> None:
    def run_many(*_: Any, **__: Any) -> None:
        raise TimeoutError("a proxy does not answer")

    monkeypatch.setattr(serve, "run_many", run_many)
    monkeypatch.setattr(serve, "delete", lambda name: calls.append("serve.delete"))
    make_cluster(calls, tmp_path, claim).stop()
    assert calls == ["serve.delete", "ray.stop"]
    assert "a proxy does not answer" in caplog.text


def test_interrupted_while_it_drains_it_ends_at_once_and_is_not_interrupted_again(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, claim: socket.socket
) -> None:
    """Whoever presses Ctrl-C for a third time would leave processes behind."""

    def delete(name: str) -> None:
        raise KeyboardInterrupt

    class Impatient(FakeRay):
        def stop(self) -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
            super().stop()

    monkeypatch.setattr(serve, "delete", delete)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    cluster = LocalCluster(make_settings(1), tmp_path, cast(LocalRay, Impatient(calls)), claim)
    with pytest.raises(KeyboardInterrupt):
        cluster.stop()
    assert calls == ["serve.run_many", "ray.stop"]
    assert not tmp_path.exists(), "a temporary folder of figures goes with the cluster"
    assert claim.fileno() == -1, "its port is free"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_lost_ray_is_told_while_the_cluster_runs_and_not_when_it_has_ended(
    calls: list[str], tmp_path: Path, claim: socket.socket
) -> None:
    told: list[tuple[LocalCluster, str]] = []
    first = make_cluster(calls, tmp_path, claim)
    first.watch(lambda cluster, problem: told.append((cluster, problem)))
    first.kill()
    second = make_cluster(calls, tmp_path, claim)
    calls.append("raylet ends")
    second.watch(lambda cluster, problem: told.append((cluster, problem)))
    deadline = time.monotonic() + 5
    while not told and time.monotonic() < deadline:
        time.sleep(0.05)
    second.kill()
    assert told == [(second, "Ray's raylet (process 7) ended")]


def test_a_port_that_is_taken_is_refused_before_ray_is_started(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRay, "start", lambda: calls.append("ray.start"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError) as refused:
            start(make_settings(port))
    assert refused.value.port == port
    assert calls == []


def changed(settings: Settings, section: str, **values: Any) -> Settings:
    """With some values changed, of every gang where the section is prefill."""
    if section == "prefill":
        part = gangs_with(settings, **values)
    else:
        part = getattr(settings, section).model_copy(update=values)
    return settings.model_copy(update={section: part})


def test_a_machine_that_is_too_small_is_refused_before_anything_is_deployed(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks and a decode worker ask for half a CPU each."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(serve, "start", lambda **options: calls.append("serve.start"))
    with pytest.raises(ConfigurationError, match=r"1\.5 CPUs together and this machine has 1;"):
        start(make_settings(free_port()))
    assert calls == ["ray.stop"]


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("prefill", {"replicas": 4}, "8 prefill ranks and 1 decode workers ask for 4.5 CPUs"),
        ("decode", {"cpus": 1.1}, "2.1 CPUs together and this machine has 2; lower"),
        ("prefill", {"gpus_per_rank": 1.0}, "2 GPUs together and this machine has 1"),
        ("decode", {"gpus": 2.0}, "lower prefill.gpus_per_rank, decode.gpus"),
        ("prefill", {"placement": "STRICT_SPREAD"}, "use STRICT_PACK"),
        ("prefill", {"nodes": {"pool": "a"}}, "prefill.nodes wants nodes with labels"),
        ("decode", {"nodes": {"pool": "a"}}, "decode.nodes wants nodes with labels"),
        ("ingress", {"nodes": {"pool": "a"}}, "ingress.nodes wants nodes with labels"),
    ],
)
def test_what_a_machine_lacks_is_named(section: str, values: dict[str, Any], said: str) -> None:
    settings = make_settings(1)
    has = {"CPU": 2.0, "GPU": 1.0}
    check_room(settings, has)
    with pytest.raises(ConfigurationError) as refused:
        check_room(changed(settings, section, **values), has)
    assert said in str(refused.value)


def test_parts_of_a_cpu_add_up_as_ray_counts_them() -> None:
    """0.1 + 0.1 + 0.1 is more than 0.3 in binary."""
    settings = changed(make_settings(1), "prefill", cpus_per_rank=0.1)
    check_room(changed(settings, "decode", cpus=0.1), {"CPU": 0.3})


def test_ranks_of_all_gangs_are_counted() -> None:
    """Two ranks of half a CPU, one of 0.25, and a worker of a half."""
    settings = with_two_gangs(make_settings(1))
    check_room(settings, {"CPU": 1.75})
    with pytest.raises(ConfigurationError, match=r"3 prefill ranks .* 1\.75 CPUs"):
        check_room(settings, {"CPU": 1.7})


def test_ranks_of_decode_workers_are_counted() -> None:
    """Two ranks of a gang and two of a worker, of half a CPU each."""
    settings = changed(make_settings(1), "decode", tensor_parallel=2)
    check_room(settings, {"CPU": 2})
    with pytest.raises(ConfigurationError, match=r"2 ranks of decode workers .* 2 CPUs"):
        check_room(settings, {"CPU": 1.9})


def with_two_gangs(settings: Settings) -> Settings:
    (long,) = settings.prefill
    short = PrefillSettings(
        name="short", max_prompt_tokens=4096, kv_cache_tokens=4096, cpus_per_rank=0.25
    )
    named = long.model_copy(update={"name": "long"})
    return settings.model_copy(update={"prefill": (short, named)})


def test_a_gang_has_a_deployment_and_several_have_one_each() -> None:
    settings = make_settings(1)
    assert prefill_names(settings) == ["prefill"]
    assert prefill_names(with_two_gangs(settings)) == ["prefill-short", "prefill-long"]


def test_what_a_rank_said_is_told_and_not_the_trace_around_it() -> None:
    trace = (
        "RuntimeError: Traceback (most recent call last):\n"
        "ray.exceptions.RayTaskError(ConfigurationError): ray::PrefillRank.join()\n"
        "longreach.engine.errors.ConfigurationError: too little memory; lower this\n"
    )
    assert startup_failure(["", trace]) == "too little memory; lower this"
    assert startup_failure(["", "RuntimeError: something else"]) is None
