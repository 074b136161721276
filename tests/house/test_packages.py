"""What is installed is all there is, and what the docs name can be called."""

import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from longreach.cluster.cli import commands
from longreach.cluster.cli.main import app
from longreach.lab.house.imports import FLOORS, House

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *ROOT.glob("**/docs/**/*.md"),
     *(page for floor in FLOORS for page in (ROOT / floor).rglob("*.md"))]
)  # fmt: skip


def test_every_package_is_installed() -> None:
    folders = {
        ".".join(("longreach", *path.parent.relative_to(ROOT).parts))
        for floor in FLOORS
        for path in (ROOT / floor).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders


def test_type_checkers_find_every_floor() -> None:
    assert {path.name for path in (ROOT / "typings" / "longreach").iterdir()} == set(FLOORS)
    assert {*FLOORS, "tests"} == set(PROJECT["tool"]["basedpyright"]["include"])


def test_what_is_called_as_a_module_is_one() -> None:
    modules = House.read(ROOT).modules
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = {name.rstrip(".") for name in re.findall(r"python -m longreach\.([\w.]+)", text)}
    assert {"lab.evaluation", "lab.kernel_bench", "loadtest.overhead"} <= named
    for name in named:
        assert f"{name}.__main__" in modules or "__main__" in (
            ROOT.joinpath(*name.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        )


def test_what_is_called_as_a_command_is_one() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?:^    |`)longreach ([a-z]+)", text, re.MULTILINE))
    declared = PROJECT["project"]["entry-points"][commands.GROUP]
    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert {"serve", "eval"} <= named
    assert named <= known | declared.keys()


def test_declared_commands_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As declared in the tree, whatever is installed."""
    entries = PROJECT["project"]["entry-points"][commands.GROUP]
    found = [EntryPoint(name, value, commands.GROUP) for name, value in entries.items()]
    monkeypatch.setattr(commands, "entry_points", lambda group: found)
    listed = CliRunner().invoke(app, ["--help"])
    assert listed.exit_code == 0
    group = get_command(app)
    assert isinstance(group, commands.Commands)
    for name in entries:
        assert re.search(rf"\b{name}\b", listed.output)
        called = CliRunner().invoke(app, [name, "--help"])
        assert called.exit_code == 0
        assert f"longreach {name}" in called.output
    assert CliRunner().invoke(app, ["no-such-command"]).exit_code == 2
