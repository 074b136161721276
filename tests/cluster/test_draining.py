"""A node that is about to go waits for what is under way on it."""

import threading
import time
from pathlib import Path

import pytest

from longreach.cluster import metrics as m
from longreach.cluster.draining import wait_until_idle


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
    with m.Metrics(tmp_path, role="decode", model_name="pocket") as decode:
        decode.set(gauge, value)
        assert not wait_until_idle(tmp_path, time.time() + 0.2, look_seconds=0.01)
        threading.Timer(0.3, decode.set, (gauge, 0)).start()
        began = time.time()
        assert wait_until_idle(tmp_path, began + 10, look_seconds=0.01)
        assert time.time() - began >= 0.3


def test_a_node_without_figures_is_idle_and_one_in_time_trouble_is_not(tmp_path: Path) -> None:
    assert wait_until_idle(tmp_path / "none", time.time() + 10, look_seconds=0.001)
    assert not wait_until_idle(tmp_path / "none", time.time() - 1)
