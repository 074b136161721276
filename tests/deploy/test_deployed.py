"""The laptop overlay's serve configuration on Ray nodes of this machine, as `serve deploy` gets it.

`make check-deploy` runs this: a head without CPUs and two workers, as the overlay's pods are. All
that is changed are addresses and folders.
"""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from longreach.cluster.cli.demo import DemoOptions, ask_for_hidden_key
from longreach.cluster.metrics import render
from longreach.deploy.check import serving
from longreach.deploy.check.kubectl import Kubectl, unpacked

from ..prometheus import free_port
from .ray_nodes import RayCluster, ray_cluster

pytestmark = pytest.mark.live

OVERLAY = Path(__file__).parents[2] / "deploy" / "k8s" / "overlays" / "laptop"
TOOLS = Path(sys.prefix) / "kubectl"
KEY = "sk-of-this-test"
DRAIN = """
import sys, time, ray
from pathlib import Path
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from longreach.cluster import draining, nodes
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=0)
def drain(directory):
    deadline = time.time() + 90
    draining.announce(deadline)
    return draining.wait_until_idle(nodes.metrics_of_node(directory), deadline)

here = NodeAffinitySchedulingStrategy(sys.argv[2], soft=False)
print("idle", ray.get(drain.options(scheduling_strategy=here).remote(Path(sys.argv[3]))))
"""


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
        deadline, said = time.monotonic() + 240, ""
        while True:
            try:
                self.ray.run("serve", "deploy", str(path), "-a", self.ray.dashboard)
                break
            except AssertionError:  # a busy machine's proxies come late
                assert time.monotonic() < deadline
        while time.monotonic() < deadline:
            said = self.ray.run("serve", "status", "-a", self.ray.dashboard)
            (application,) = yaml.safe_load(said)["applications"].values()
            assert application["status"] not in ("DEPLOY_FAILED", "UNHEALTHY"), said
            if application["status"] == "RUNNING" and self.is_ready():
                return
            time.sleep(0.5)
        raise AssertionError(said)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, prompt: str, **fields: Any) -> httpx.Response:
        body = {"model": "longreach-pocket", "prompt": prompt, "max_tokens": 2, **fields}
        answer = httpx.post(
            f"{self.url}/v1/completions",
            json=body,
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=120,
        )
        self.sent += answer.status_code == 200
        return answer

    def counted(self, name: str) -> float:
        """Of all nodes together, as Prometheus would add up what their exporters say."""
        return sum(
            sample.value
            for node in self.figures.iterdir()
            for family in text_string_to_metric_families(render(node).decode())
            for sample in family.samples
            if sample.name == name and sample.labels.get("outcome", "success") == "success"
        )


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployed")
    manifests = Kubectl(unpacked(TOOLS)).build(OVERLAY)
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


def test_it_answers_a_needle(deployment: Deployment) -> None:
    options = DemoOptions(tokens=16384, seed=7, depth=0.3)
    report = ask_for_hidden_key(deployment.url, options, 0, Console(file=StringIO()), KEY)
    deployment.sent += 1
    assert report.correct, report.answer
    assert report.prompt_tokens == 16384
    assert httpx.get(f"{deployment.url}/v1/models").status_code == 401


def test_what_all_nodes_count_is_what_was_sent(deployment: Deployment) -> None:
    tokens = deployment.counted("longreach_prompt_tokens_total")
    answers = [deployment.ask("word " * 200) for _ in range(4)]
    sent = sum(answer.json()["usage"]["prompt_tokens"] for answer in answers)
    time.sleep(0.5)
    assert deployment.counted("longreach_requests_total") == deployment.sent
    assert deployment.counted("longreach_prompt_tokens_total") - tokens == sent
    roles = {role for node in deployment.figures.iterdir() for role in roles_on(node)}
    assert roles == {"ingress", "decode", "prefill"}
    assert len(list(deployment.figures.iterdir())) <= 2, "the head has no work"


def roles_on(node: Path) -> set[str]:
    families = text_string_to_metric_families(render(node).decode())
    return {sample.labels["role"] for family in families for sample in family.samples}


def test_a_change_and_its_rollback_lose_no_request(deployment: Deployment) -> None:
    """One request is under way at each, of some seconds; others come one after the other."""
    long, statuses = "word " * 12_000, []
    with ThreadPoolExecutor(2) as pool:
        for logprobs, allowed in ((3, 400), (5, 200)):
            under_way = pool.submit(deployment.ask, long)
            change = pool.submit(deployment.deploy, max_logprobs=logprobs)
            while not change.done():
                statuses.append(deployment.ask("word").status_code)
            change.result()
            statuses.append(under_way.result().status_code)
            assert deployment.ask("word", logprobs=4).status_code == allowed
    assert set(statuses) == {200}


def test_a_node_that_drains_finishes_its_work_and_the_others_go_on(
    deployment: Deployment,
) -> None:
    node = next(each for each in deployment.figures.iterdir() if "decode" in roles_on(each))
    statuses = []
    with ThreadPoolExecutor(2) as pool:
        arguments = ("-c", DRAIN, deployment.ray.address, node.name, str(deployment.figures))
        drained = pool.submit(deployment.ray.run, "python", *arguments)
        while not drained.done():
            statuses.append(deployment.ask("word").status_code)
        assert "idle True" in drained.result()
    assert set(statuses) == {200}
    assert deployment.ask("word " * 500).status_code == 200
