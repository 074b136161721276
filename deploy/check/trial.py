"""An image, tried on this machine for want of a container engine: `make check-images`.

What the Dockerfile's build stage copies and runs is copied and run here, in a folder in place of
/opt/longreach. What came out is then started as the image would start it: as its user, with its
environment, without capabilities, every disk read-only but /tmp. It must answer a needle, by the
settings of the laptop overlay.
"""

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .dockerfile import stages
from .serving import cluster_config

ROOT = Path(__file__).resolve().parents[2]
CPU_IMAGE = ROOT / "deploy" / "images" / "cpu.Dockerfile"
_OVERLAY = ROOT / "deploy" / "k8s" / "overlays" / "laptop" / "serve.yaml"
_MANIFESTS = ROOT / "deploy" / "k8s"
_PREFIX = "/opt/longreach"
"""Where the image has what is installed here into another folder."""
_BY_KUBERAY = ("ray", "python")
_TOKENS = 16384
_BUILD_SECONDS = 1500
_RUN_SECONDS = 300

_READ_ONLY = """
set -e
python=$1 closed=$2 beside=$3 work=$4
shift 4
mount --make-rprivate /
if [ "$closed" ]; then
    # This machine's Python lies where the image's user may not go; the image's does not.
    mount --bind "$python" "$beside"
    mount -t tmpfs -o mode=755 tmpfs "$closed"
    mkdir -p "$python"
    mount --bind "$beside" "$python"
fi
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -o remount,bind,ro /
cd "$work"
exec "$@"
"""


class TrialError(Exception):
    """A step of the image did not work; with what it said."""


class Trial:
    """Args: dockerfile: of two stages; context: what its COPY means; folder: a place for both."""

    def __init__(self, dockerfile: Path, context: Path, folder: Path) -> None:
        self._build, self._last = stages(dockerfile.read_text(encoding="utf-8"))
        self._context = context
        self._source = folder / "source"
        self._prefix = folder / "longreach"
        self._python = folder / "python"

    def build(self) -> None:
        """Do what the build stage does.

        Raises:
            TrialError: a step failed, or copies what is kept out of the context.
        """
        self._source.mkdir()
        self._python.mkdir()
        environment = self._build.environment(_outside())
        for keyword, text in self._build.steps:
            if keyword == "COPY":
                *names, target = text.split()
                for name in names:
                    self._copy(name, self._source / target)
            elif keyword == "RUN":
                command = ["sh", "-ec", self._here(text)]
                _run(command, _BUILD_SECONDS, cwd=self._source, env=environment)

    def has(self, program: str) -> bool:
        """Whether the image has a program of its own by that name."""
        return os.access(self._prefix / "bin" / program, os.X_OK)

    def run(self, *arguments: str) -> str:
        """What the image's entry point says with these arguments, as a pod would run it.

        Raises:
            TrialError: it failed.
        """
        (entry,) = (json.loads(text) for text in self._last.of("ENTRYPOINT"))
        return self.execute(*entry, *arguments)

    def execute(self, *command: str) -> str:
        """As `run`, without the entry point."""
        user, _, group = self._last.of("USER")[-1].partition(":")
        (where,) = self._last.of("WORKDIR")
        environment = self._last.environment({"PATH": "/usr/local/bin:/usr/bin:/bin"})
        variables = [f"{name}={self._here(value)}" for name, value in environment.items()]
        as_user = [
            "setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs",
            "--bounding-set=-all", "env", "--ignore-environment", *variables, *command,
        ]  # fmt: skip
        places = (sys.base_prefix, _closed_above(Path(sys.base_prefix)), self._python, where)
        script = ["unshare", "--mount", "sh", "-c", _READ_ONLY, "sh", *map(str, places)]
        return _run([*script, *as_user], _RUN_SECONDS)

    def _here(self, text: str) -> str:
        return text.replace(_PREFIX, str(self._prefix))

    def _copy(self, name: str, target: Path) -> None:
        kept = (self._context / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if f"!{name}" not in kept:
            raise TrialError(f"COPY {name}: .dockerignore keeps it out; add !{name} there")
        source = self._context / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def programs_of_manifests() -> set[str]:
    """What containers of our image start, and what KubeRay starts in them."""
    found: set[str] = set(_BY_KUBERAY)
    for path in sorted(_MANIFESTS.rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            for container in _containers(document):
                found |= set(container.get("command", [])[:1])
                hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {})
                found |= set(hook.get("command", [])[:1])
    return found


def _containers(document: Any) -> Iterator[dict[str, Any]]:
    """Of our image, however deep."""
    if isinstance(document, list):
        for each in document:
            yield from _containers(each)
    if isinstance(document, dict):
        if document.get("image") == "longreach":
            yield document
        for each in document.values():
            yield from _containers(each)


def settings_for_one_machine(folder: Path) -> Path:
    """A file with the overlay's settings, for a cluster that only this machine reaches."""
    config = cluster_config(yaml.safe_load(_OVERLAY.read_text(encoding="utf-8")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        config["ingress"] = {"host": "127.0.0.1", "port": probe.getsockname()[1]}
    del config["metrics"]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def try_image(dockerfile: Path, folder: Path) -> Iterator[str]:
    """What was done, step by step.

    Raises:
        TrialError: a step did not work.
    """
    trial = Trial(dockerfile, ROOT, folder)
    began = time.monotonic()
    trial.build()
    yield f"{dockerfile.name} is built in {time.monotonic() - began:.0f} s"
    for program in sorted(programs_of_manifests()):
        if not trial.has(program):
            raise TrialError(f"a manifest starts {program}, which the image does not have")
    yield f"it has what manifests start: {', '.join(sorted(programs_of_manifests()))}"
    _check_read_only(trial, folder)
    yield "as its user it can write to /tmp and not to where it is installed"
    path = settings_for_one_machine(folder)
    arguments = ("demo", str(path), "--tokens", str(_TOKENS), "--exit", "--json")
    report = json.loads(trial.run(*arguments).splitlines()[-1])
    yield f"it found the key in {report['prompt_tokens']} tokens, {report['answer']!r}"


def _check_read_only(trial: Trial, folder: Path) -> None:
    trial.execute("sh", "-c", "touch /tmp/here")
    for place in (folder, Path("/var/tmp"), Path("/")):
        trial.execute("sh", "-c", f"! touch {shlex.quote(str(place / 'here'))} 2>/dev/null")


def _closed_above(path: Path) -> Path | str:
    """The first folder on the way to a path that only its owner may enter; empty where none is."""
    return next((each for each in reversed(path.parents) if not each.stat().st_mode & 0o001), "")


def _outside() -> dict[str, str]:
    """What the build finds: this machine's way to packages, and as `python` what made this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PATH": f"{sys.base_prefix}/bin:{os.environ['PATH']}"}


def _run(command: list[str], seconds: float, **options: Any) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, **options)
    except subprocess.TimeoutExpired as error:
        raise TrialError(f"{shlex.join(command)[-300:]} took over {seconds:g} s") from error
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-3000:]
        raise TrialError(f"{shlex.join(command)[-300:]} ended with {done.returncode}: {said}")
    return done.stdout


def main() -> int:
    """Every step; status 1 where one did not work."""
    parser = argparse.ArgumentParser(
        prog="python -m longreach.deploy.check.trial", description=__doc__
    )
    parser.add_argument("--image", type=Path, default=CPU_IMAGE, help="a Dockerfile")
    options = parser.parse_args()
    if os.geteuid():
        print("mounts and users are changed, which needs root", file=sys.stderr)
        return 1
    # Not below /tmp, which the image has empty.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="longreach-image-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        try:
            for line in try_image(options.image, folder):
                print(line, flush=True)
        except TrialError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
