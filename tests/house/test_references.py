"""Whatever the pages name is there: files, sections, modules, commands and targets."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from longreach.cluster.cli.main import app

ROOT = Path(__file__).parents[2]
FOLDERS = (
    "cluster", "configs", "deploy", "docs", "engine", "kernels", "lab", "loadtest", "plugins",
    "tests",
)  # fmt: skip
PAGES = [
    page
    for pattern in ("*.md", *(f"{folder}/**/*.md" for folder in FOLDERS))
    for page in sorted(ROOT.glob(pattern))
    if page.name != "CHANGELOG.md"
]
"""A changelog names what was."""
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
IN_BACKTICKS = re.compile(r"`([^`\n]+)`")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
CODE = re.compile(r"^ {4}.+$", re.MULTILINE)
PATH = re.compile(rf"(?<![\w./*-])(?:{'|'.join(FOLDERS)})/[\w./-]*")
MODULE = re.compile(r"python -m longreach\.([\w.]+)")
COMMAND = re.compile(r"(?<![\w./-])(?:\.venv/bin/)?longreach ([a-z]+)")
NAME_IN_FILE = re.compile(r"`([\w.]+)`(?: of `[\w.]+`)? in \[?`([\w./-]+\.py)`")
TARGET = re.compile(r"(?<![\w./-])make ([a-z-]+)")


def called(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(page: Path) -> str:
    """What stands in backticks and in indented blocks, a piece a line."""
    text = page.read_text(encoding="utf-8")
    return "\n".join([*IN_BACKTICKS.findall(text), *CODE.findall(text)])


def anchors(page: Path) -> set[str]:
    """What a heading is called in a link, as GitHub makes it."""
    headings = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def missing_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", name):
            continue
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def commands() -> set[str | None]:
    """Of `longreach`: its own, groups of them, and those that other packages bring."""
    own = {
        each.name or getattr(each.callback, "__name__", None) for each in app.registered_commands
    }
    groups = {each.name for each in app.registered_groups if isinstance(each.name, str)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return own | groups | set(project.get("entry-points", {}).get("longreach.commands", {}))


def is_there(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(missing_links(page)) == []


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=called)
def test_every_path_that_is_named_exists(page: Path) -> None:
    text = code_of(page) if page.suffix == ".md" else page.read_text(encoding="utf-8")
    named = {path.rstrip("./") for path in PATH.findall(text)}
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_every_name_is_in_the_file_that_it_is_said_to_be_in(page: Path) -> None:
    for name, path in NAME_IN_FILE.findall(page.read_text(encoding="utf-8")):
        source = next(each for each in (ROOT / path, page.parent / path) if each.exists())
        for word in name.split("."):
            assert re.search(rf"\b{word}\b", source.read_text(encoding="utf-8")), (name, path)


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_every_command_that_is_named_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = code_of(page)
    assert set(COMMAND.findall(code)) - commands() == set()
    assert {module for module in MODULE.findall(code) if not is_there(module)} == set()
    assert set(TARGET.findall(code)) - targets == set()
