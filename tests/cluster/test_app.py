"""Starting and stopping a cluster, with Ray and Serve replaced by what they would say."""

from pathlib import Path

import pytest
import ray
from ray import serve

from longreach.cluster.app import LocalCluster

from .conftest import make_settings


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called, in order."""
    made: list[str] = []
    monkeypatch.setattr(ray, "shutdown", lambda: made.append("ray.shutdown"))
    return made


def test_draining_may_take_longer_than_serve_waits(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`serve.delete` gives up after a minute, whatever a deployment's own limit."""

    def delete(name: str) -> None:
        calls.append("serve.delete")
        if len(calls) < 3:
            raise TimeoutError("not deleted after 60s")

    monkeypatch.setattr(serve, "delete", delete)
    LocalCluster(make_settings(1), tmp_path, temporary=False).stop()
    assert calls == ["serve.delete"] * 3 + ["ray.shutdown"]
