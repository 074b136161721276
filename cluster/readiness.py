"""Whether an endpoint answers, and would serve requests, by the standard library alone."""

import time
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

from ..engine.errors import UnavailableError

READY_SECONDS = 300.0
_SECONDS = 2
_POLL_SECONDS = 0.1


def is_ready(url: str) -> bool:
    """Ask `/ready` of the endpoint at `url`, without a proxy in between."""
    return _status(f"{url}/ready") == 200


def wait_until_ready(url: str, timeout: float = READY_SECONDS) -> None:
    """Return when the endpoint at `url` would serve requests.

    Raises:
        UnavailableError: time is up.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if is_ready(url):
            return
        time.sleep(_POLL_SECONDS)
    raise UnavailableError(f"the cluster was not ready after {timeout:.0f} s")


def is_alive(url: str) -> bool:
    """Whether the node's front answers at all, with or without an application behind it."""
    return _status(f"{url}/-/healthz") is not None


def _status(url: str) -> int | None:
    """Of an answer; None where there is no connection, no answer in time, or no HTTP."""
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=_SECONDS) as answer:
            return answer.status
    except HTTPError as refusal:
        return refusal.code
    except (OSError, HTTPException):
        return None
