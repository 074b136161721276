"""Alerts: that Prometheus reads them, that their tests hold, and that Kubernetes gets the same."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import yaml

from .problems import Problem

RULES, TESTS = "alerts.yaml", "alerts-test.yaml"


def problems(monitoring: Path, prometheus_rule: Path) -> Iterator[Problem]:
    """Args: monitoring: the folder of rules and tests; prometheus_rule: the operator's resource."""
    resource = yaml.safe_load(prometheus_rule.read_text(encoding="utf-8"))
    if resource["spec"] != yaml.safe_load((monitoring / RULES).read_text(encoding="utf-8")):
        yield Problem(
            prometheus_rule.name,
            f"has other rules than {RULES}; write them by `python -m longreach.deploy.dashboards`",
        )
    promtool = shutil.which("promtool")
    if promtool is None:
        yield Problem(RULES, "no promtool to check it; install Debian's package `prometheus`")
        return
    for arguments in (["check", "rules", RULES], ["test", "rules", TESTS]):
        done = subprocess.run(
            [promtool, *arguments], cwd=monitoring, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            yield Problem(arguments[-1], (done.stderr + done.stdout).strip()[-2000:])
    yield from _untested(monitoring)


def _untested(monitoring: Path) -> Iterator[Problem]:
    """Every alert is to be seen both firing and silent."""
    rules = yaml.safe_load((monitoring / RULES).read_text(encoding="utf-8"))
    tests = yaml.safe_load((monitoring / TESTS).read_text(encoding="utf-8"))
    cases = [case for test in tests["tests"] for case in test.get("alert_rule_test", [])]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    for group in rules["groups"]:
        for rule in group["rules"]:
            for what, seen in (("fires", fires), ("does not fire", silent)):
                if "alert" in rule and rule["alert"] not in seen:
                    yield Problem(RULES, f"no test that {rule['alert']} {what}; add one to {TESTS}")
