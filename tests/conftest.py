"""Triton's interpreter where there is no GPU; and which of several workers runs which tests."""

import os
from typing import Any

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported, which other tests do as well.
    os.environ.setdefault("TRITON_INTERPRET", "1")

CLUSTERS = (
    "tests/cluster/served/test_spanning.py",
    "tests/cluster/served/test_two_gangs.py",
    "tests/cluster/test_cluster.py",
    "tests/cluster/test_front.py",
    "tests/cluster/test_mixed_load.py",
    "tests/cluster/test_stopping.py",
    "tests/loadtest/chaos/test_cluster_under_fire.py",
)
"""Files whose tests need a cluster; those of `tests/cluster` share one, and those of `served`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """For live tests, whose figures stand in the docs."""
    parser.addoption("--record", action="store_true", help="write what live tests saw into docs/")


def pytest_configure(config: pytest.Config) -> None:
    # Tests say nothing of speed: whoever is slow shares the machine.
    hypothesis.settings.register_profile("any speed", deadline=None)
    hypothesis.settings.load_profile("any speed")
    if hasattr(config, "workerinput"):
        # The other core is for the other worker.
        torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: two, and one where there is a GPU, whose memory tests fill.

    More would not help much, because clusters come one after the other.
    """
    return 1 if torch.cuda.is_available() else 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file goes to one worker as a whole, and all clusters, which take longest, to the first.

    So nothing that a file's or a folder's tests share is made twice, and there is one cluster at
    a time.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "clusters" if file in CLUSTERS else file

    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """Clusters first, where several workers share the tests."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.nodeid.partition("::")[0] not in CLUSTERS)


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> bool:
    """Whether pages get what is seen now."""
    return bool(request.config.getoption("--record"))
