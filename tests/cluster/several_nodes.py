"""Ray nodes of this machine, each with an address of its own, of which one can be killed.

Pages go between them by NIXL over TCP, as between hosts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import HTTPOptions, ProxyLocation

from longreach.cluster.app import LOGGING, deploy
from longreach.cluster.ingress import front_of
from longreach.cluster.readiness import is_ready
from longreach.cluster.settings import parse_settings

from ..figures import counted
from ..prometheus import free_port
from .conftest import MODEL, actor_pids, wait_for

CHUNK_TOKENS = 1024
SECONDS = 600.0
CONFIGURATION: dict[str, Any] = {
    "model": {"path": "pocket", "name": MODEL, "dtype": "float32"},
    "limits": {"max_model_len": 131_072, "max_output_tokens": 1024},
    "prefill": {
        "sequence_parallel": 2,
        "chunk_tokens": CHUNK_TOKENS,
        "kv_cache_tokens": 131_072,
        "cpus_per_rank": 1.0,
        "nodes": {"longreach": "prefill"},
    },
    "decode": {
        "kv_cache_tokens": 164_864,
        "cpus": 1.0,
        "prefill_up_to": 0,
        "nodes": {"longreach": "decode"},
    },
    "ingress": {"nodes": {"longreach": "ingress"}},
    "transport": {"kind": "nixl"},
    "shutdown": {"drain_seconds": 10.0},
}
ROOM = {"prefill": 2, "decode": 1, "ingress": 1}
"""CPUs of a node by what it is for: a gang of two ranks, or a worker."""


@dataclass
class Nodes:
    """A Ray cluster, whose nodes that die are found by their label, and its endpoint."""

    cluster: Cluster
    by_label: dict[str, list[Any]]
    url: str
    figures: Path

    def ask(self, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=SECONDS)

    def chat(self, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=SECONDS)

    def counted(self, name: str) -> float:
        """Of all nodes together, those that died too."""
        return counted(self.figures, name)

    def where(self, label: str, actor: str) -> Any:
        """The node with this label on which an actor lives."""
        (node,) = (each for each in self.by_label[label] if actor_pids(actor, raylet_of(each).pid))
        return node

    def kill(self, label: str, node: Any) -> None:
        kill_all_of(node)
        self.by_label[label].remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


def raylet_of(node: Any) -> psutil.Process:
    (info,) = node.all_processes["raylet"]
    return psutil.Process(info.process.pid)


def kill_all_of(node: Any) -> None:
    """End every process of a node at once, as a host that loses its power does."""
    raylet = raylet_of(node)
    for process in (*raylet.children(recursive=True), raylet):
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def started(configuration: dict[str, Any], labels: Sequence[str], folder: Path) -> Iterator[Nodes]:
    """A cluster of nodes with these labels, one for each.

    Args:
        folder: where its figures go.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("UCX_TLS", "tcp")  # as between hosts; Ray's processes inherit it
        figures = folder / "figures"
        port = free_port()
        raw = configuration | {"metrics": {"directory": str(figures)}}
        raw["ingress"] = {**raw["ingress"], "port": port}
        settings = parse_settings(raw)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        by_label: dict[str, list[Any]] = {}
        try:
            for number, label in enumerate(labels, start=2):
                node = cluster.add_node(
                    num_cpus=ROOM[label],
                    node_ip_address=f"127.0.0.{number}",
                    labels={"longreach": label},
                )
                by_label.setdefault(label, []).append(node)
            ray.init(address=cluster.address, log_to_driver=False)
            serve.start(
                proxy_location=ProxyLocation.HeadOnly,
                http_options=HTTPOptions(host="127.0.0.1", port=port),
                controller_options=front_of(settings),
                logging_config=LOGGING,
            )
            deploy(settings, figures)
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: is_ready(url), SECONDS, "the cluster is ready")
            yield Nodes(cluster, by_label, url, figures)
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()


ACTORS = {"prefill": "PrefillRank", "decode": "DecodeWorker"}
"""Who is on a node of which label."""
