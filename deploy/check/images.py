"""Dockerfiles: what hadolint says, and what must be true of ours."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .dockerfile import stages
from .problems import Problem


def problems(folder: Path) -> Iterator[Problem]:
    """Of every Dockerfile of a folder."""
    for path in sorted(folder.glob("*.Dockerfile")):
        for what in _of_image(path.read_text(encoding="utf-8")):
            yield Problem(path.name, what)
        yield from _linted(path)


def _linted(path: Path) -> Iterator[Problem]:
    # Beside this Python, whose folder need not be on the path.
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        yield Problem(path.name, "no hadolint to check it; install the extra `deploy`")
        return
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True, timeout=60)
    if done.returncode:
        yield Problem(path.name, done.stdout.strip())


def _of_image(text: str) -> Iterator[str]:
    found = stages(text)
    names = {stage.name for stage in found}
    for stage in found:
        image = stage.image
        if image not in names and (":" not in image or image.endswith(":latest")):
            yield f"starts from {image}; name a version"
    users = found[-1].of("USER") if found else []
    if not users or users[-1].partition(":")[0] in ("0", "root"):
        yield "runs as root; end with USER and a number above 0"
    if len(found) < 2:
        yield "has one stage; build in one and run in another, so that compilers stay out"
    if not found or found[-1].of("ENTRYPOINT") != ['["longreach"]']:
        yield 'does not start longreach; set ENTRYPOINT ["longreach"]'
