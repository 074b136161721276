"""Noticing that what a cluster stands on is gone."""

import threading
import time

import pytest

from longreach.cluster.watch import ClusterWatch, SilenceBudget


def test_silence_counts_from_its_beginning_and_an_answer_ends_it() -> None:
    budget = SilenceBudget()
    assert budget.update({"raylet": 60}, 0) is None
    assert budget.update({"raylet": 60, "proxy": 75}, 50) is None
    assert budget.update({"proxy": 75}, 61) is None
    assert budget.update({"raylet": 60, "proxy": 75}, 62) is None
    lost = budget.update({"proxy": 75}, 125)
    assert lost is not None
    assert "proxy" in lost
    assert "75 s" in lost


@pytest.mark.parametrize("problem", ["the raylet ended", None])
def test_what_ended_is_told_once_and_at_once(problem: str | None) -> None:
    told: list[str] = []
    called = threading.Event()

    def on_lost(problem: str) -> None:
        told.append(problem)
        called.set()

    watch = ClusterWatch(lambda: problem, dict, on_lost)
    began = time.monotonic()
    watch.start()
    assert called.wait(3 if problem else 1.2) == (problem is not None)
    watch.close()
    assert told == ([problem] if problem else [])
    assert time.monotonic() - began < 3


def test_nothing_is_told_once_the_cluster_is_being_stopped() -> None:
    told: list[str] = []
    ended: list[str] = []
    watch = ClusterWatch(lambda: ended[0] if ended else None, dict, told.append)
    watch.start()
    watch.close()
    ended.append("the raylet ended")
    time.sleep(1.2)
    assert told == []
