"""Whether an endpoint would serve requests, by the standard library alone."""

from http.client import HTTPException
from urllib.request import ProxyHandler, build_opener

_SECONDS = 2


def is_ready(url: str) -> bool:
    """Ask `/ready` of the endpoint at `url`, without a proxy in between."""
    try:
        with build_opener(ProxyHandler({})).open(f"{url}/ready", timeout=_SECONDS) as answer:
            return answer.status == 200
    except (OSError, HTTPException):  # no connection, no answer in time, no HTTP, or a refusal
        return False
