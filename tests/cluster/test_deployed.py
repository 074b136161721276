"""The application as Ray Serve's configurations name it, and on a Ray that runs already."""

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.config import HTTPOptions
from typer.testing import CliRunner

from longreach.cluster import nodes
from longreach.cluster.app import build, build_application
from longreach.cluster.cli.main import app
from longreach.cluster.deployed import check_listens, deploy_at
from longreach.cluster.settings import IngressSettings, parse_settings
from longreach.engine.errors import CheckpointError, ConfigurationError, UnavailableError

from .conftest import make_settings

CONFIG = Path(__file__).parents[2] / "configs" / "laptop-two-gangs.yaml"


def built(arguments: dict[str, Any], folder: Path) -> list[str]:
    """Names of the deployments that Serve would make of these arguments, the ingress first."""
    config = arguments["config"]
    if isinstance(config, dict):
        config["metrics"] = {"directory": str(folder)}
    application = call_user_app_builder_with_args_if_necessary(build_application, arguments)
    return names(application)


def names(bound: Any) -> list[str]:
    """Of the deployments in what was bound, however deep."""
    return [deployment.name for deployment in deployments(bound)]


def deployments(bound: Any) -> list[Any]:
    """In what was bound, however deep."""
    if isinstance(bound, list | tuple):
        return [found for each in bound for found in deployments(each)]
    if not isinstance(bound, serve.Application):
        return []
    deployment = bound._bound_deployment
    return [deployment, *deployments(deployment.init_args)]


def test_who_waits_for_others_is_given_more_time_to_go(tmp_path: Path) -> None:
    """Else Serve would kill the ingress together with the gang whose prompts are to go on."""
    shutdown = {"drain_seconds": 20.0, "hand_over_seconds": 300.0}
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8")) | {"shutdown": shutdown}
    application = build(parse_settings(config), tmp_path)
    seconds = {
        each.name: each._deployment_config.graceful_shutdown_timeout_s
        for each in deployments(application)
    }
    assert seconds == {"ingress": 320, "decode": 200, "prefill-short": 20, "prefill-long": 20}


def test_serve_builds_it_from_a_configuration(tmp_path: Path) -> None:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    expected = ["ingress", "decode", "prefill-short", "prefill-long"]
    assert built({"config": config}, tmp_path) == expected
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(config))
    assert built({"config": str(written)}, tmp_path) == expected


def test_a_checkpoint_that_lies_on_other_nodes_is_not_looked_for(tmp_path: Path) -> None:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["model"]["path"] = str(tmp_path / "elsewhere")
    assert built({"config": config}, tmp_path)[0] == "ingress"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"config": {"model": {}}},
        {"config": "no-such-file.yaml"},
        {"config": {}, "settings": {}},
    ],
)
def test_arguments_that_cannot_run_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises((ConfigurationError, ValueError)):
        call_user_app_builder_with_args_if_necessary(build_application, arguments)


def test_what_is_missing_is_missing_on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "/models/a/model-00002-of-00004.safetensors is named in the index but does not exist"
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    with pytest.raises(CheckpointError) as refused, nodes.reading_here():
        raise CheckpointError(missing)
    assert missing in str(refused.value)
    assert "10.0.0.7" in str(refused.value)


def test_figures_of_each_node_lie_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Context:
        def get_node_id(self) -> str:
            return "abc"

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert nodes.metrics_of_node(tmp_path) == tmp_path
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    assert nodes.metrics_of_node(tmp_path) == tmp_path / "abc"


def test_proxies_that_listen_elsewhere_are_refused() -> None:
    proxies = HTTPOptions(host="0.0.0.0", port=8000)
    check_listens(proxies, IngressSettings(host="0.0.0.0", port=8000))
    for other in (IngressSettings(host="0.0.0.0", port=8001), IngressSettings(port=8000)):
        with pytest.raises(ConfigurationError, match="port 8000"):
            check_listens(proxies, other)


def test_where_no_ray_is_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UnavailableError, match="auto"):
        deploy_at("auto", make_settings(1))


def test_only_what_stays_elsewhere_can_be_left() -> None:
    refused = CliRunner().invoke(app, ["serve", str(CONFIG), "--detach"])
    assert isinstance(refused.exception, ConfigurationError)
