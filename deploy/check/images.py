"""Dockerfiles: what hadolint says, and what must be true of ours."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
    """The last stage is what runs."""
    stages = re.split(r"(?m)^FROM ", text)[1:]
    names = {match[1] for stage in stages if (match := re.match(r"\S+ AS (\S+)", stage))}
    for stage in stages:
        image = stage.split()[0]
        if image not in names and (":" not in image or image.endswith(":latest")):
            yield f"starts from {image}; name a version"
    last = stages[-1] if stages else ""
    users = re.findall(r"(?m)^USER (\S+)", last)
    if not users or users[-1].partition(":")[0] in ("0", "root"):
        yield "runs as root; end with USER and a number above 0"
    if len(stages) < 2:
        yield "has one stage; build in one and run in another, so that compilers stay out"
    if 'ENTRYPOINT ["longreach"]' not in last:
        yield 'does not start longreach; set ENTRYPOINT ["longreach"]'
