"""A cluster to break: one that runs already, or one that is started as a user would start it."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from .client import Client
from .processes import Belongings, ProcessTree

PAGE_TOKENS = 128
_READY_SECONDS = 300.0
_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.2

Overrides = Mapping[str, Mapping[str, Any]]
"""Section -> key -> value, in place of what a configuration says."""


class LaunchError(Exception):
    """`longreach serve` did not become ready."""


@dataclass(frozen=True)
class Config:
    """What the suite has to know of a cluster's YAML file."""

    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path, overrides: Overrides | None = None) -> "Config":
        """Of a file, with some values replaced."""
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section, replaced in (overrides or {}).items():
            values[section] = {**values.get(section, {}), **replaced}
        return cls(values)

    @property
    def url(self) -> str:
        """Of the endpoint."""
        ingress = self.values.get("ingress", {})
        return f"http://{ingress.get('host', '127.0.0.1')}:{ingress.get('port', 8000)}"

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its answer."""
        return int(self.values["limits"]["max_model_len"])

    @property
    def own_prompt_tokens(self) -> int:
        """Tokens of the longest prompt that decode workers compute themselves, without a gang."""
        decode = self.values["decode"]
        asked = decode.get("prefill_up_to")
        by_default = 8_192 if decode.get("gpus") else 2_048
        return by_default if asked is None else int(asked)

    def pages(self, role: str) -> int:
        """KV pages of one pool of a role, "prefill" or "decode"."""
        return -(-int(self.values[role]["kv_cache_tokens"]) // PAGE_TOKENS)


class Cluster:
    """A cluster that serves. `serve` is None where somebody else started it."""

    def __init__(self, config: Config, pid: int, serve: "subprocess.Popen[bytes] | None") -> None:
        self.config = config
        self.client = Client(config.url)
        self.tree = ProcessTree(pid)
        self._serve = serve

    @property
    def is_ours(self) -> bool:
        """Whether it may be ended."""
        return self._serve is not None

    def has_ended(self) -> bool:
        """Whether `longreach serve` is gone."""
        if self._serve is not None:
            return self._serve.poll() is not None
        return not self.tree.serve.is_running()

    def wait_for_end(self, seconds: float) -> int | None:
        """The exit status of `longreach serve`; None where it still runs after so many seconds."""
        assert self._serve is not None, "the status of somebody else's process is not known"
        try:
            return self._serve.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def belongings(self) -> Belongings:
        """What must be gone when it has ended."""
        return self.tree.watch_what_remains()

    def leaked_pages(self, seconds: float) -> int | None:
        """Pages in use although nobody asks for anything; None where nobody answers.

        Asked again until there are none, for so many seconds at most.
        """
        deadline = time.monotonic() + seconds
        while True:
            usage = self.client.page_usage()
            leaked = None if usage is None else self._pages_in_use(usage)
            if leaked == 0 or time.monotonic() > deadline:
                return leaked
            time.sleep(_POLL_SECONDS)

    def _pages_in_use(self, usage: dict[str, float]) -> int:
        shares = {role: share for role, share in usage.items() if share}
        return sum(max(1, round(share * self.config.pages(role))) for role, share in shares.items())


def attach(path: Path, pid: int) -> Cluster:
    """The cluster that process `pid` serves from this configuration."""
    return Cluster(Config.read(path), pid, None)


@contextmanager
def launched(path: Path, overrides: Overrides | None = None) -> Iterator[Cluster]:
    """Run `longreach serve` until the end of the block, with some settings replaced.

    Raises:
        LaunchError: it was not ready in time; with the end of what it said.
    """
    config = Config.read(path, overrides)
    with tempfile.TemporaryDirectory(prefix="longreach-chaos-") as folder:
        written, said = Path(folder) / "config.yaml", Path(folder) / "serve.log"
        written.write_text(yaml.safe_dump(config.values), encoding="utf-8")
        with said.open("wb") as log:
            command = [str(Path(sys.executable).with_name("longreach")), "serve", str(written)]
            serve = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        cluster = Cluster(config, serve.pid, serve)
        belongings: Belongings | None = None
        try:
            _wait_until_ready(cluster, said)
            belongings = cluster.belongings()
            yield cluster
        finally:
            _end(cluster, serve, belongings)


def _wait_until_ready(cluster: Cluster, said: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not cluster.client.is_ready():
        if cluster.has_ended() or time.monotonic() > deadline:
            raise LaunchError(f"the cluster is not ready: {said.read_text()[-2000:]}")
        time.sleep(_POLL_SECONDS)


def _end(cluster: Cluster, serve: "subprocess.Popen[bytes]", belongings: Belongings | None) -> None:
    """Stop it at once, and kill what does not stop."""
    now = cluster.belongings()
    if serve.poll() is None:
        # The second one says not to wait for requests.
        for _ in range(2):
            serve.send_signal(signal.SIGTERM)
            time.sleep(_POLL_SECONDS)
    try:
        serve.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        psutil.Process(serve.pid).kill()
        serve.wait()
    for each in (belongings, now):
        if each is not None:
            each.end()
