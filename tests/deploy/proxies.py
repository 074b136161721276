"""nginx and HAProxy, run from the examples that are committed."""

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ..prometheus import free_port

PROXIES = ("nginx", "haproxy")
_EXAMPLES = Path(__file__).parents[2] / "deploy" / "proxies"
_READY_SECONDS = 30.0


@contextmanager
def proxy(
    name: str, folder: Path, ports: Sequence[int], silence: str | None = None
) -> Iterator[str]:
    """The URL of a proxy in front of two endpoints of this machine.

    Skips the test where there is no such proxy.

    Args:
        name: one of PROXIES.
        silence: in place of the hour that either side may be silent.
    """
    binary = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if binary is None:
        pytest.skip(f"no {name} here; Debian has a package of that name")
    front = free_port()
    process = subprocess.Popen(_command(name, binary, folder, (front, *ports), silence or "3600s"))
    url = f"http://127.0.0.1:{front}"
    try:
        deadline = time.monotonic() + _READY_SECONDS
        while not is_ready(url):
            assert time.monotonic() < deadline, f"{name} is not ready"
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def is_ready(url: str) -> bool:
    """Whether an endpoint behind a URL is."""
    try:
        return httpx.get(f"{url}/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def _command(
    name: str, binary: str, folder: Path, ports: tuple[int, ...], silence: str
) -> list[str]:
    """Args: ports: in place of those in the example: its own, and the two endpoints'."""
    suffix = "conf" if name == "nginx" else "cfg"
    text = (_EXAMPLES / f"{name}.{suffix}").read_text()
    for written, used in zip((8080, 8001, 8002), ports, strict=True):
        assert f"127.0.0.1:{written}" in text
        text = text.replace(f"127.0.0.1:{written}", f"127.0.0.1:{used}")
    assert "3600s" in text
    text = text.replace("3600s", silence).replace("/tmp/longreach-nginx", str(folder / "nginx"))
    path = folder / f"{name}.{suffix}"
    path.write_text(text)
    if name == "nginx":
        return [binary, "-c", str(path), "-g", "daemon off;"]
    return [binary, "-f", str(path), "-db"]
