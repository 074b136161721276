"""Dashboards and alerts: what is committed is what is made, and its queries are of our metrics."""

import json
import re
from itertools import pairwise
from pathlib import Path

import promql_parser
import pytest
import yaml

from longreach.cluster import metrics as m
from longreach.deploy.dashboards.__main__ import files
from longreach.deploy.dashboards.boards import BOARDS

ROOT = Path(__file__).parents[2]
ALERTS = yaml.safe_load((ROOT / "deploy" / "monitoring" / "alerts.yaml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUERIES = [
    pytest.param(query.expression, id=f"{board.name}: {panel.title}")
    for board in BOARDS
    for panel in board.panels
    for query in panel.queries
]
NAMES = {
    f"{metric.name}{suffix}"
    for metric in m.VOCABULARY
    for suffix in (("_bucket", "_sum", "_count") if isinstance(metric, m.Histogram) else ("",))
}


def plain(query: str) -> str:
    """Without Grafana's variables."""
    values = {"$model": ".*", "$__rate_interval": "1m", "$gpus": "8", "$cost": "2.5"}
    for name, value in values.items():
        query = query.replace(name, value)
    return query


def labels_of(metric: str) -> set[str]:
    known = next(each for each in m.VOCABULARY if metric.startswith(each.name))
    return {*known.labels, *m.COMMON_LABELS, "gang", "le"}


def check(query: str) -> None:
    """It parses, and names metrics and labels that there are."""
    promql_parser.parse(query)
    named = re.findall(r"\b(longreach_\w+)(?:\{([^}]*)\})?", query)
    for metric, selected in named:
        assert metric in NAMES
        assert set(re.findall(r"(\w+)=", selected)) <= labels_of(metric)


def test_what_is_committed_is_what_is_made() -> None:
    """Otherwise: `python -m longreach.deploy.dashboards`."""
    made = dict(files())
    assert len(made) == len(BOARDS) + 2
    assert [path for path, text in made.items() if path.read_text(encoding="utf-8") != text] == []


@pytest.mark.parametrize("query", QUERIES)
def test_panels_ask_for_what_there_is(query: str) -> None:
    check(plain(query))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_ask_for_what_there_is_and_have_a_runbook(rule: dict) -> None:
    check(rule["expr"])
    assert rule["labels"]["severity"] in ("page", "ticket")
    page = (ROOT / rule["annotations"]["runbook"]).read_text(encoding="utf-8")
    assert rule["alert"] in page


def test_panels_say_what_to_do_and_stand_beside_each_other() -> None:
    for board in BOARDS:
        path = ROOT / "deploy" / "monitoring" / "dashboards" / f"{board.name}.json"
        panels = json.loads(path.read_text())["panels"]
        assert [panel["title"] for panel in panels] == [panel.title for panel in board.panels]
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
        assert len(set(places)) == len(places)
        for panel, made in zip(board.panels, panels, strict=True):
            assert made["description"] == panel.act
            assert made["fieldConfig"]["defaults"]["unit"] == panel.unit
            reds = [
                step["value"]
                for step in made["fieldConfig"]["defaults"]["thresholds"]["steps"]
                if step["color"] == ("green" if panel.below else "red")
                and step["value"] is not None
            ]
            assert reds == ([] if panel.red is None else [panel.red])


def test_buckets_are_fine_where_the_limits_on_long_prompts_lie() -> None:
    within = [bound for bound in m.TIME_TO_FIRST_TOKEN.buckets if 60 <= bound <= 600]
    steps = [later / before for before, later in pairwise(within)]
    assert max(steps) <= 1.34
