"""What is deployed of the laptop overlay answers, counts, changes and drains.

`make check-deployed` runs this.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path

import httpx
import pytest
import yaml
from rich.console import Console

from longreach.cluster.cli.demo import DemoOptions, ask_for_hidden_key
from longreach.deploy.check import serving

from ..figures import samples_on
from .deployment import KEY, Deployment, deployed_overlay

pytestmark = pytest.mark.live

DRAIN = """
import sys, time, ray
from pathlib import Path
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from longreach.cluster import draining
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=0)
def drain(directory):
    return draining.leave(directory, time.time() + 90)

here = NodeAffinitySchedulingStrategy(sys.argv[2], soft=False)
print("idle", ray.get(drain.options(scheduling_strategy=here).remote(Path(sys.argv[3]))))
"""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed_overlay(tmp_path_factory.mktemp("deployed")) as made:
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
    return {sample.labels["role"] for sample in samples_on(node)}


def test_a_change_and_its_rollback_lose_no_request(deployment: Deployment) -> None:
    """One request is under way at each, of some seconds; others come one after the other."""
    long, statuses = "word " * 6_000, []
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


def test_longreach_serve_deploys_there_too(deployment: Deployment) -> None:
    """In place of what is there; it leaves, and the application stays."""
    config = serving.cluster_config(deployment.config)
    config["limits"].update(max_logprobs=7)
    path = deployment.folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = ("serve", str(path), "--address", deployment.ray.address, "--detach")
    deployment.ray.run("longreach", *arguments, seconds=300)
    assert deployment.ask("word", logprobs=6).status_code == 200


def test_a_node_that_drains_finishes_its_work_and_the_others_go_on(
    deployment: Deployment,
) -> None:
    """All proxies of a machine share a port. So the client keeps its connection, which is one to a
    proxy that stays, once the one that goes has closed its own.
    """
    node = next(each for each in deployment.figures.iterdir() if "decode" in roles_on(each))
    statuses = []
    with ThreadPoolExecutor(2) as pool, httpx.Client() as client:
        arguments = ("-c", DRAIN, deployment.ray.address, node.name, str(deployment.figures))
        drained = pool.submit(deployment.ray.run, "python", *arguments)
        while not drained.done():
            statuses.append(deployment.ask("word", client).status_code)
        assert "idle True" in drained.result()
    assert set(statuses) == {200}
    assert deployment.ask("word " * 500).status_code == 200


def test_a_missing_checkpoint_is_named_with_its_node(deployment: Deployment) -> None:
    """The last test: what was deployed is gone then."""
    config = serving.cluster_config(deployment.config)
    config["model"]["path"] = "/nowhere/model"
    path = deployment.folder / "missing.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = ("serve", str(path), "--address", deployment.ray.address, "--detach")
    said = r"/nowhere/model\S* does not exist[\s\S]*on node \d+\.\d+\.\d+\.\d+,"
    with pytest.raises(AssertionError, match=said):
        deployment.ray.run("longreach", *arguments, seconds=300)
