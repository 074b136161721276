"""The laptop overlay's serve configuration on Ray nodes of this machine, as `serve deploy` gets it.

A head without CPUs and two workers, as the overlay's pods are. All that is changed are addresses
and folders.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from longreach.deploy.check import serving
from longreach.deploy.check.kubectl import Kubectl, unpacked

from ..figures import counted
from ..prometheus import free_port
from .ray_nodes import RayCluster, ray_cluster

MODEL = "longreach-pocket"
KEY = "sk-of-this-test"
HEADERS = {"Authorization": f"Bearer {KEY}"}
_OVERLAY = Path(__file__).parents[2] / "deploy" / "k8s" / "overlays" / "laptop"
_TOOLS = Path(sys.prefix) / "kubectl"
_DEPLOYED_SECONDS = 240.0


@dataclass
class Deployment:
    """The overlay's configuration on a Ray cluster; `sent` counts requests that were answered."""

    ray: RayCluster
    config: dict[str, Any]
    folder: Path
    sent: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config['http_options']['port']}"

    @property
    def figures(self) -> Path:
        return Path(serving.cluster_config(self.config)["metrics"]["directory"])

    def deploy(self, **limits: int) -> None:
        """`serve deploy`, with some limits of requests changed; returns when it is done."""
        serving.cluster_config(self.config)["limits"].update(limits)
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(self.config))
        deadline, said = time.monotonic() + _DEPLOYED_SECONDS, {}
        while True:
            try:
                self.ray.run("serve", "deploy", str(path), "-a", self.ray.dashboard)
                break
            except AssertionError:  # a busy machine's proxies come late
                assert time.monotonic() < deadline
        while time.monotonic() < deadline:
            said = self.ray.serve_status()
            states = {application["status"] for application in said.values()}
            assert not states & {"DEPLOY_FAILED", "UNHEALTHY"}, said
            if states == {"RUNNING"} and self.is_ready():
                return
            time.sleep(0.5)
        raise AssertionError(said)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, prompt: str, client: httpx.Client | None = None, **fields: Any) -> httpx.Response:
        """By a connection of its own, or by one that a client keeps."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 2, **fields}
        post = httpx.post if client is None else client.post
        answer = post(f"{self.url}/v1/completions", json=body, headers=HEADERS, timeout=300)
        self.sent += answer.status_code == 200
        return answer

    def counted(self, name: str) -> float:
        """Of all nodes together, as Prometheus would add up what their exporters say."""
        return counted(self.figures, name)


@contextmanager
def deployed_overlay(folder: Path) -> Iterator[Deployment]:
    """Ready at the start of the block, and gone at its end."""
    manifests = Kubectl(unpacked(_TOOLS)).build(_OVERLAY)
    (service,) = [each for each in manifests if each["kind"] == "RayService"]
    config = serving.serve_config(service)
    keys = folder / "keys"
    keys.write_text(KEY)
    here = {"host": "127.0.0.1", "port": free_port()}
    config["http_options"].update(here)
    cluster = serving.cluster_config(config)
    cluster["ingress"].update(here, api_keys_file=str(keys))
    cluster["metrics"]["directory"] = str(folder / "figures")
    with ray_cluster(workers=2, cpus=2) as nodes:
        made = Deployment(nodes, config, folder)
        made.deploy()
        yield made
