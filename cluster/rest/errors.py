"""What a client is told when something cannot be done: OpenAI's error body and a status."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi.responses import JSONResponse

from ...engine.errors import (
    InvalidRequestError,
    LongreachError,
    OutOfPagesError,
    PromptTooLongError,
    QueueFullError,
    innermost,
)
from ..remedies import remedied

logger = logging.getLogger(__name__)

BUSY_SECONDS = 5
"""After which a client may try again, where nothing says better."""


@dataclass
class RestError(Exception):
    """One error response. `message` must be fit for strangers."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

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


def as_rest_error(error: BaseException) -> RestError:
    """What to tell the client about any error; whatever we did not expect stays in our log."""
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
            retry = {"Retry-After": str(error.retry_after)}
            return RestError(429, str(error), "rate_limit_error", code="queue_full", headers=retry)
        case OutOfPagesError():
            retry = {"Retry-After": str(BUSY_SECONDS)}
            return RestError(
                429, f"{error}; try again later", "rate_limit_error", code="busy", headers=retry
            )
        case LongreachError():
            retry = {"Retry-After": str(BUSY_SECONDS)}
            return RestError(503, str(error), "server_error", code="unavailable", headers=retry)
        case _:
            logger.error("a request failed unexpectedly", exc_info=error)
            return RestError(
                500,
                "the server failed on this request; its log says why",
                "server_error",
                code="internal_error",
            )
