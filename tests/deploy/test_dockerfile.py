"""Dockerfiles as they are read, and what of an image can be tried without an engine."""

import tomllib
from pathlib import Path

import pytest

from longreach.deploy.check.dockerfile import stages
from longreach.deploy.check.trial import CPU_IMAGE, ROOT, Trial, TrialError, programs_of_manifests

TEXT = """# Comment
FROM python:3 AS build
ARG INDEX=""
ENV A=1 \\
    B="two $A"
RUN first \\
# Within
    && second
COPY a b

FROM base
ENV PATH=/here:$PATH
"""


def test_stages_and_their_instructions_are_read() -> None:
    first, last = stages(TEXT)
    assert (first.image, first.name) == ("python:3", "build")
    assert (last.image, last.name) == ("base", None)
    assert first.of("RUN") == ["first && second"]
    assert first.of("COPY") == ["a b"]
    assert first.environment({}) == {"INDEX": "", "A": "1", "B": "two 1"}
    assert last.environment({"PATH": "/bin"}) == {"PATH": "/here:/bin"}


@pytest.mark.parametrize("path", sorted(CPU_IMAGE.parent.glob("*.Dockerfile")), ids=str)
def test_images_get_every_package(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    build, _ = stages(path.read_text())
    copied = {name for text in build.of("COPY") for name in text.split()[:-1]}
    assert {package.split(".")[1] for package in packages} <= copied


def test_what_manifests_start_is_known() -> None:
    assert {"longreach", "hf", "ray"} <= programs_of_manifests()


def test_the_build_copies_what_it_names(tmp_path: Path) -> None:
    """Without its RUN, which installs everything: `make check-images` does."""
    text = CPU_IMAGE.read_text()
    path = tmp_path / "one.Dockerfile"
    lines = [line for line in text.splitlines() if line.startswith(("FROM", "COPY"))]
    path.write_text("\n".join(lines))
    Trial(path, ROOT, tmp_path).build()
    assert (tmp_path / "source" / "cluster" / "app.py").is_file()
    assert (tmp_path / "source" / "pyproject.toml").is_file()
    assert not list((tmp_path / "source").rglob("__pycache__"))


@pytest.mark.parametrize("step", ["COPY tests tests", "RUN exit 3"])
def test_a_step_that_fails_is_told(tmp_path: Path, step: str) -> None:
    path = tmp_path / "one.Dockerfile"
    path.write_text(f"FROM python:3 AS build\n{step}\nFROM python:3\n")
    with pytest.raises(TrialError, match=step.split()[1]):
        Trial(path, ROOT, tmp_path).build()
