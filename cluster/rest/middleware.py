"""What happens to every request before any endpoint sees it."""

import hashlib
import hmac
import re
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...engine.errors import ConfigurationError
from .errors import RestError, as_rest_error

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def read_api_keys(path: Path | None) -> tuple[str, ...]:
    """Keys from a file, one a line, where `#` begins a comment line; none without a file.

    Raises:
        ConfigurationError: the file cannot be read or has no key.
    """
    if path is None:
        return ()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the API key file {path} cannot be read: {error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigurationError(
            f"the API key file {path} holds no key; write one a line, or set api_keys_file: null"
        )
    return keys


class RequestIds:
    """Every response carries `x-request-id`: the client's own where it is fit to repeat."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class Failures:
    """Answers whatever nobody expected with a clean 500; the log has what happened."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            if started or scope["type"] != "http":
                raise
            await as_rest_error(error).response()(scope, receive, send)


class ApiKeys:
    """Asks for `Authorization: Bearer KEY`, except on open paths."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: Collection[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["path"] not in self._open_paths
        if guarded and not self._is_known(_bearer(scope)):
            refusal = RestError(
                401,
                "a valid API key is required; send it as 'Authorization: Bearer KEY'",
                "authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_known(self, key: bytes) -> bool:
        digest = _digest(key)
        # Every key is compared, so that time tells nothing about which one came near.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def _digest(key: bytes) -> bytes:
    """Of one length for all keys, so that comparing them takes one time."""
    return hashlib.sha256(key).digest()


def _bearer(scope: Scope) -> bytes:
    value = Headers(scope=scope).get("authorization", "")
    scheme, _, key = value.partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


class BodyLimit:
    """Refuses bodies over the limit while they are read, announced or not."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            await self._discard(receive, 0)
            await self._too_large().response()(scope, receive, send)
            return
        read = 0

        async def receive_within_limit() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:
                if message.get("more_body", False):
                    await self._discard(receive, read)
                raise self._too_large()
            return message

        await self._app(scope, receive_within_limit, send)

    async def _discard(self, receive: Receive, read: int) -> None:
        """Read on for a while: most clients look for an answer only when they have sent all."""
        more = True
        while more and read <= 2 * self._max_bytes:
            message = await receive()
            read += len(message.get("body", b""))
            more = message.get("more_body", False)

    def _too_large(self) -> RestError:
        return RestError(
            413,
            f"the body is larger than {self._max_bytes} bytes, the most that is read",
            code="body_too_large",
        )
