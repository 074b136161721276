"""What is asked to go while it has work: another configuration, fewer replicas, a node's notice.

`make check-nodes` runs this. One cluster goes through it all, so tests come in their order. The
ingress is on a node that stays, and prompts take longer than whatever is asked to go may.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve._private.common import DeploymentID, ReplicaState
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import HTTPOptions, ProxyLocation

from longreach.cluster.app import APP_NAME, LOGGING, build
from longreach.cluster.draining import announce
from longreach.cluster.ingress import front_of
from longreach.cluster.readiness import is_ready
from longreach.cluster.settings import Settings, parse_settings, sections
from longreach.engine.text.tokenizer import Tokenizer

from ..figures import counted
from ..prometheus import free_port
from .conftest import MODEL, ask_body, make_prompt, wait_for
from .several_nodes import kill_all_of

pytestmark = pytest.mark.live

CHUNK_TOKENS = 1024
PROMPT_TOKENS = 40_000
BEGUN = 6 * CHUNK_TOKENS
"""Tokens that were computed when something is asked to go."""
SECONDS = 300.0
COMPUTED = "longreach_prefill_tokens_total"
AGAIN = "longreach_prefill_tokens_again_total"
RECOVERIES = "longreach_request_recoveries_total"


def settings_of(port: int, figures: Path, **shutdown: float) -> Settings:
    """Of a gang of one rank and a decode worker, which have room beside those of another one."""
    on_a_node = {"nodes": {"longreach": "work"}}
    return parse_settings(
        {
            "model": {"path": "pocket", "name": MODEL, "dtype": "float32"},
            "limits": {"max_model_len": 131_072},
            "prefill": {
                "chunk_tokens": CHUNK_TOKENS,
                "kv_cache_tokens": 262_144,
                "cpus_per_rank": 0.25,
                **on_a_node,
            },
            "decode": {"kv_cache_tokens": 164_864, "cpus": 0.25, "prefill_up_to": 0, **on_a_node},
            "ingress": {"port": port, "nodes": {"longreach": "front"}, "progress_seconds": 0.2},
            "metrics": {"directory": str(figures)},
            "shutdown": shutdown,
        }
    )


@dataclass
class Going:
    """A Ray cluster, its endpoint, and what a prompt is answered with when nobody disturbs it."""

    cluster: Cluster
    work: Any
    port: int
    figures: Path
    body: dict[str, Any]
    undisturbed: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def deploy(self, **shutdown: float) -> None:
        settings = settings_of(self.port, self.figures, **shutdown)
        application = build(settings, self.figures)
        serve.run(application, name=APP_NAME, logging_config=LOGGING, external_scaler_enabled=True)

    def ask(self) -> str:
        answer = httpx.post(f"{self.url}/v1/completions", json=self.body, timeout=SECONDS)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def stream(self) -> str:
        body = {**self.body, "stream": True}
        text = ""
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=SECONDS) as told:
            assert told.status_code == 200
            for line in told.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    text += "".join(choice["text"] for choice in event["choices"])
        return text

    def while_asked(self, what: Callable[[], None]) -> tuple[float, float]:
        """Do something to two prompts under way, a stream and none; both must be answered right.

        Returns:
            Tokens that were computed, and of these those that had been before.
        """
        computed, again, recoveries = map(self.counted, (COMPUTED, AGAIN, RECOVERIES))
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(self.ask), pool.submit(self.stream)]
            wait_for(lambda: self.counted(COMPUTED) - computed >= BEGUN, SECONDS, "some chunks")
            what()
            assert [answer.result(SECONDS) for answer in answers] == [self.undisturbed] * 2
        assert self.counted(RECOVERIES) > recoveries
        return self.counted(COMPUTED) - computed, self.counted(AGAIN) - again

    def counted(self, name: str) -> float:
        """Of all nodes together, those that are gone too."""
        return counted(self.figures, name)

    def scale(self, deployment: str, replicas: int) -> None:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        of = DeploymentID(name=deployment, app_name=APP_NAME)
        ray.get(controller.update_deployment_replicas.remote(of, replicas))
        wanted = {ReplicaState.RUNNING: replicas}
        wait_for(lambda: states(deployment) == wanted, SECONDS, f"{replicas} of {deployment}")

    def add_node(self, address: str) -> Any:
        return self.cluster.add_node(
            num_cpus=2, node_ip_address=address, labels={"longreach": "work"}
        )


def states(deployment: str) -> dict[ReplicaState, int]:
    """How many replicas are in which of Serve's states; those that are asked to go are STOPPING."""
    return serve.status().applications[APP_NAME].deployments[deployment].replica_states


@pytest.fixture(scope="module")
def going(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[Going]:
    figures = tmp_path_factory.mktemp("going") / "figures"
    port = free_port()
    prompt = make_prompt(tokenizer, PROMPT_TOKENS)
    fields = {"temperature": 0.8, "seed": 5, "max_tokens": 60, "ignore_eos": True}
    head = {"num_cpus": 1, "labels": {"longreach": "front"}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        made = Going(cluster, None, port, figures, ask_body(prompt, **fields))
        made.work = made.add_node("127.0.0.2")
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host="127.0.0.1", port=port),
            controller_options=front_of(settings_of(port, figures)),
            logging_config=LOGGING,
        )
        made.deploy(drain_seconds=1.0, hand_over_seconds=SECONDS)
        wait_for(lambda: is_ready(made.url), SECONDS, "the cluster is ready")
        made.undisturbed = made.ask()
        yield made
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def test_a_redeployment_hands_prompts_over_to_the_new_gang(
    going: Going, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old gang is killed under them, the old decode replica stays with their pages."""
    # For those that the next test replaces: decode replicas that are killed soon after their gang.
    monkeypatch.setattr(sections, "RECOVERY_SECONDS", 2.0)
    _, again = going.while_asked(lambda: going.deploy(drain_seconds=1.0, hand_over_seconds=SECONDS))
    assert again <= 2 * CHUNK_TOKENS, "one of each prompt"


def test_where_decode_replicas_go_too_the_ingress_stays_and_begins_again(going: Going) -> None:
    going.while_asked(lambda: going.deploy(drain_seconds=SECONDS))


def test_a_gang_too_many_goes_as_soon_as_another_can_go_on(going: Going) -> None:
    """And not when its prompts are finished, or when its time is over."""
    going.scale("prefill", 2)

    def one_fewer() -> None:
        going.scale("prefill", 1)
        assert going.counted(COMPUTED) < before + 2 * PROMPT_TOKENS, "the prompts are not computed"

    before = going.counted(COMPUTED)
    computed, again = going.while_asked(one_fewer)
    assert again <= 2 * CHUNK_TOKENS
    assert computed <= 2 * (PROMPT_TOKENS + CHUNK_TOKENS)


def test_a_node_that_is_to_go_hands_its_prompts_over_before_it_does(going: Going) -> None:
    leaving, going.work = going.work, going.add_node("127.0.0.3")

    def notice() -> None:
        deadline = time.time() + 30.0
        announce(deadline, leaving.node_id)
        time.sleep(deadline - time.time())
        kill_all_of(leaving)
        going.cluster.remove_node(leaving, allow_graceful=False)

    _, again = going.while_asked(notice)
    assert again <= 4 * CHUNK_TOKENS, "of each prompt, one for the gang and one for the worker"
