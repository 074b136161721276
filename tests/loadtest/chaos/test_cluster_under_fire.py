"""The chaos suite's short version, on a cluster that is started as a user starts it.

One kill a kind, a storm of clients that leave, and an end at SIGTERM. What is asserted are values
that every cluster must show, and no times that a busy machine would miss. A few of them are met by
`make test`, on one cluster; the others, which are marked `slow`, by `make test-slow`.
"""

from collections.abc import Mapping

import pytest
import yaml

from longreach.loadtest.chaos.scenarios import choose
from longreach.loadtest.chaos.suite import Plan, Result, run

from ...prometheus import free_port


def slow(*scenarios: str) -> list[object]:
    """For `parametrize`."""
    return [pytest.param(each, marks=pytest.mark.slow) for each in scenarios]


OUTLIVED = [
    "kill-rank-prefill",
    *slow(
        "kill-prefill-replica-hand-off",
        "kill-decode-worker-decode",
        "kill-decode-replica-decode",
    ),
]
REPLACED = slow(
    "kill-ingress-decode",
    "kill-proxy-idle",
    "kill-controller-idle",
)
FATAL = slow("kill-gcs-idle", "kill-raylet-decode")

CONFIG = {
    "model": {"path": "pocket", "name": "longreach-pocket", "dtype": "float32"},
    "limits": {"max_model_len": 131072},
    "prefill": {
        "sequence_parallel": 2,
        "chunk_tokens": 2048,
        "kv_cache_tokens": 262144,
        "cpus_per_rank": 0.5,
    },
    "decode": {"kv_cache_tokens": 164864, "cpus": 0.5},
    "shutdown": {"drain_seconds": 60.0},
}


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Result]:
    """Of every scenario that a test of this run is about, by its name."""
    path = tmp_path_factory.mktemp("chaos") / "cluster.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "ingress": {"port": free_port()}}))
    plan = Plan(path, pid=None, sizes=(1_000, 3_000), timeout=120.0, seed=1)
    names = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module
    ]
    return {each.row.scenario: each for each in run(plan, choose(names), "test")}


@pytest.mark.parametrize("name", ["storm-200"])
def test_clients_that_leave_cost_honest_ones_nothing(
    results: Mapping[str, Result], name: str
) -> None:
    row = results[name].row
    assert row.requests > 0
    assert (row.lost, row.wrong, row.hung, row.leaked_pages) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", OUTLIVED)
def test_requests_outlive_what_serves_them(results: Mapping[str, Result], name: str) -> None:
    """They wait for what takes its place, and are answered rightly; none is lost."""
    row = results[name].row
    assert row.requests == 3
    assert (row.lost, row.wrong, row.leaked_pages) == (0, 0, 0)
    assert row.served_again_s is not None
    assert row.ready_again_s is not None


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_killed_is_replaced(results: Mapping[str, Result], name: str) -> None:
    """Clients of an ingress or a proxy lose their connections with it, and hear so at once."""
    row = results[name].row
    assert (row.wrong, row.hung, row.leaked_pages) == (0, 0, 0)
    assert row.served_again_s is not None
    assert row.ready_again_s is not None


@pytest.mark.parametrize("name", ["sigterm"])
def test_sigterm_lets_requests_finish_and_leaves_nothing(
    results: Mapping[str, Result], name: str
) -> None:
    result = results[name]
    assert (result.row.requests, result.row.lost, result.row.wrong) == (3, 0, 0)
    assert result.measured.ending is not None
    assert result.measured.ending.status == 0
    assert not result.measured.ending.remains


@pytest.mark.parametrize("name", FATAL)
def test_a_cluster_without_ray_ends_and_leaves_nothing(
    results: Mapping[str, Result], name: str
) -> None:
    """Within seconds, not after the minute that Ray itself takes, or never."""
    ending = results[name].measured.ending
    assert ending is not None
    assert ending.status == 1
    assert ending.seconds < 30
    assert not ending.remains
