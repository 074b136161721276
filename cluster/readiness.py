"""Whether an endpoint answers, and would serve requests, by the standard library alone."""

from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

_SECONDS = 2


def is_ready(url: str) -> bool:
    """Ask `/ready` of the endpoint at `url`, without a proxy in between."""
    return _status(f"{url}/ready") == 200


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
