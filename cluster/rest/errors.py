"""What a client is told when something cannot be done: OpenAI's error body and a status."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse

from ...engine.errors import (
    InvalidRequestError,
    LongreachError,
    OutOfPagesError,
    PoisonousError,
    PromptTooLongError,
    QueueFullError,
    innermost,
)
from ..remedies import remedied

logger = logging.getLogger(__name__)

INCONSISTENT = "inconsistent_parameters"
"""Code of what is refused because of several fields together, each of which is well by itself."""

BUSY_SECONDS = 5
"""After which a client may try again, where nothing says better."""

_MOST_MESSAGE = 500
_MOST_PARAM = 100
_MOST_SHOWN = 80


def shown(sent: str) -> str:
    """What a client sent, cut to what an error may repeat of it."""
    return _clipped(sent, _MOST_SHOWN)


def _clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


@dataclass
class RestError(Exception):
    """One error response. `message` must be fit for strangers, and is cut where it is too long."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.message = _clipped(self.message, _MOST_MESSAGE)
        self.param = None if self.param is None else _clipped(self.param, _MOST_PARAM)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.status, self.message, self.type, self.param, self.code, dict(self.headers))
        return type(self), fields

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def outcome(self) -> str:
        """How requests that end like this are counted."""
        if self.status == 429:
            return "rejected"
        return "failed" if self.status >= 500 else "invalid"

    def response(self) -> JSONResponse:
        """The error as a response of its own."""
        return JSONResponse(self.body, self.status, headers=dict(self.headers))


def invalid(message: str, param: str | None = None, code: str | None = None) -> RestError:
    """A request that its sender must change."""
    return RestError(400, message, param=param, code=code)


def unavailable(message: str, code: str = "unavailable", seconds: int = BUSY_SECONDS) -> RestError:
    """A request that may be sent again, after so many seconds: something is not up."""
    return RestError(503, message, "server_error", code=code, headers=_retry_after(seconds))


def busy(message: str, code: str = "busy", seconds: int | str = BUSY_SECONDS) -> RestError:
    """A request that may be sent again, after so many seconds: there is too much to do."""
    return RestError(429, message, "rate_limit_error", code=code, headers=_retry_after(seconds))


def _retry_after(seconds: int | str) -> dict[str, str]:
    return {"Retry-After": str(seconds)}


def as_rest_error(error: BaseException, request_id: str = "") -> RestError:
    """What to tell the client about any error; whatever we did not expect stays in our log.

    Args:
        request_id: the client's and the log's name of the request, where there is one.
    """
    # An error from another process may come wrapped, with that process's stack trace for a text.
    cause = innermost(error)
    if isinstance(cause, LongreachError):
        error = remedied(cause)
    match error:
        case RestError():
            return error
        case PromptTooLongError():
            return invalid(str(error), code="context_length_exceeded")
        case InvalidRequestError():
            return invalid(str(error))
        case QueueFullError():
            return busy(str(error), "queue_full", error.retry_after)
        case OutOfPagesError():
            return busy(f"{error}; try again later")
        case PoisonousError():
            logger.error("request %s ended: %s", request_id, error)
            # Clients that know the header do not send it again by themselves.
            headers = {"x-should-retry": "false"}
            return RestError(500, str(error), "server_error", code="poisonous", headers=headers)
        case LongreachError():
            logger.warning("request %s ended: %s", request_id, error)
            return unavailable(str(error))
        case _:
            logger.error("request %s failed unexpectedly", request_id, exc_info=error)
            known_as = f" under {request_id}" if request_id else ""
            return RestError(
                500,
                f"the server failed on this request; its log says why{known_as}",
                "server_error",
                code="internal_error",
            )
