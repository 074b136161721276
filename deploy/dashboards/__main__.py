"""Writes the dashboards' JSON, the config maps of it, and the operator's resource of the alerts."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from .boards import BOARDS
from .grafana import to_json

DEPLOY = Path(__file__).resolve().parents[1]
MADE = "# Written by `python -m longreach.deploy.dashboards`; change what it is made from.\n"


def files(deploy: Path = DEPLOY) -> Iterator[tuple[Path, str]]:
    """What is made, and its text."""
    texts = {f"{board.name}.json": to_json(board) for board in BOARDS}
    for name, text in texts.items():
        yield deploy / "monitoring" / "dashboards" / name, text
    component = deploy / "k8s" / "components" / "monitoring"
    yield (
        component / "dashboards.yaml",
        MADE
        + yaml.safe_dump_all(
            [_config_map(name, text) for name, text in texts.items()], sort_keys=False
        ),
    )
    alerts = yaml.safe_load((deploy / "monitoring" / "alerts.yaml").read_text(encoding="utf-8"))
    yield (
        component / "prometheus-rule.yaml",
        MADE
        + yaml.safe_dump(
            _resource("monitoring.coreos.com/v1", "PrometheusRule", "longreach", spec=alerts),
            sort_keys=False,
            width=100,
        ),
    )


def _config_map(name: str, text: str) -> dict[str, object]:
    """As Grafana's side-car finds it, by its label."""
    stem = name.removesuffix(".json")
    made = _resource("v1", "ConfigMap", f"longreach-dashboard-{stem}", data={name: text})
    made["metadata"] = {"name": f"longreach-dashboard-{stem}", "labels": {"grafana_dashboard": "1"}}
    return made


def _resource(version: str, kind: str, name: str, **rest: object) -> dict[str, object]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **rest}


if __name__ == "__main__":
    for path, text in files():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(DEPLOY.parent))
