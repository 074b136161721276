"""Starting and stopping a cluster, with Ray and Serve replaced by what they would say."""

from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from longreach.cluster.app import LocalCluster, check_room, prefill_names, start, startup_failure
from longreach.cluster.settings import PrefillSettings, Settings
from longreach.engine.errors import ConfigurationError

from .conftest import gangs_with, make_settings


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called, in order."""
    made: list[str] = []
    monkeypatch.setattr(ray, "shutdown", lambda: made.append("ray.shutdown"))
    monkeypatch.setattr(serve, "run_many", lambda *_, **__: made.append("serve.run_many"))
    return made


def test_draining_may_take_longer_than_serve_waits(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`serve.delete` gives up after a minute, whatever a deployment's own limit."""

    def delete(name: str) -> None:
        calls.append("serve.delete")
        if len(calls) < 4:
            raise TimeoutError("not deleted after 60s")

    monkeypatch.setattr(serve, "delete", delete)
    LocalCluster(make_settings(1), tmp_path, temporary=False).stop()
    assert calls == ["serve.run_many", *["serve.delete"] * 3, "ray.shutdown"]


def test_a_cluster_that_cannot_announce_its_end_still_drains(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run_many(*_: Any, **__: Any) -> None:
        raise TimeoutError("a proxy does not answer")

    monkeypatch.setattr(serve, "run_many", run_many)
    monkeypatch.setattr(serve, "delete", lambda name: calls.append("serve.delete"))
    LocalCluster(make_settings(1), tmp_path, temporary=False).stop()
    assert calls == ["serve.delete", "ray.shutdown"]
    assert "a proxy does not answer" in caplog.text


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
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(serve, "start", lambda **options: calls.append("serve.start"))
    with pytest.raises(ConfigurationError, match=r"1\.5 CPUs together and this machine has 1;"):
        start(make_settings(1))
    assert calls == ["ray.shutdown"]


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("prefill", {"replicas": 4}, "8 prefill ranks and 1 decode workers ask for 4.5 CPUs"),
        ("decode", {"cpus": 1.1}, "2.1 CPUs together and this machine has 2; lower"),
        ("prefill", {"gpus_per_rank": 1.0}, "2 GPUs together and this machine has 1"),
        ("decode", {"gpus": 2.0}, "lower prefill.gpus_per_rank, decode.gpus"),
        ("prefill", {"placement": "STRICT_SPREAD"}, "use STRICT_PACK"),
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
