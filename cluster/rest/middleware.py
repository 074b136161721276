"""What happens to every request before any endpoint sees it."""

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...engine.errors import ConfigurationError
from .encodings import too_large
from .errors import RestError, as_rest_error, shown

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_STATE_KEY = "longreach_request_id"


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


def is_fit_request_id(given: str) -> bool:
    """Whether a client's id of a request is fit for headers and logs."""
    return _REQUEST_ID.fullmatch(given) is not None


def fit_request_id(given: str) -> str:
    """A client's `x-request-id` where it is fit for headers and logs, else a new one."""
    return given if is_fit_request_id(given) else uuid.uuid4().hex


def request_id_of(scope: Scope) -> str:
    """What `RequestIds` named this request; empty before it did."""
    return scope.get("state", {}).get(_STATE_KEY, "")


class RequestIds:
    """Every response carries `x-request-id`: the client's own where it is fit to repeat."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        request_id = fit_request_id(headers.get("x-request-id", ""))
        # Whoever stands behind, in this process or the next, is to see the same one.
        headers["x-request-id"] = request_id
        scope.setdefault("state", {})[_STATE_KEY] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [
                    (name, value)
                    for name, value in message.get("headers", [])
                    if name.lower() != b"x-request-id"
                ]
                message["headers"] = [*others, (b"x-request-id", request_id.encode())]
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
            if scope["type"] != "http":
                raise
            refusal = as_rest_error(error, request_id_of(scope))
            if started:
                raise
            await refusal.response()(scope, receive, send)


_PROBED = frozenset({"/health", "/ready"})
"""Paths that Kubernetes and proxies ask at an address, or without any name, and that say no more
than a status."""


class Doors:
    """Refuses what a web page of somebody else may send to a server on this machine.

    A page can reach a local server under a name of its own (DNS rebinding). What it can post to any
    address as long as it calls it plain text is refused by `check_media_type`.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        app = self._app if refusal is None else refusal.response()
        await app(scope, receive, send)

    def _refusal(self, scope: Scope) -> RestError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if scope["path"] not in _PROBED and not self._goes_by(host):
            return RestError(
                403,
                f"this server is not known as '{shown(host)}'; add that name to "
                "ingress.allowed_hosts",
                "permission_error",
                code="host_not_allowed",
            )
        origin = headers.get("origin", "").lower()
        if origin and not self._is_known(origin, host):
            return RestError(
                403,
                f"pages of '{shown(origin)}' may not use this server; add it to "
                "ingress.allowed_origins",
                "permission_error",
                code="origin_not_allowed",
            )
        return None

    def _goes_by(self, host: str) -> bool:
        return not self._hosts or "*" in self._hosts or _name_of(host) in self._hosts

    def _is_known(self, origin: str, host: str) -> bool:
        own = origin.partition("://")[2] == host
        return own or origin in self._origins or "*" in self._origins


def check_media_type(headers: Headers) -> None:
    """Refuse a body that is not called JSON, before it is looked at."""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise RestError(
            415,
            "the body must be JSON; send 'Content-Type: application/json'",
            code="unsupported_media_type",
        )


class Options:
    """Answers OPTIONS of any path, `*` included, with its methods.

    Args:
        methods_of: a path has.
    """

    def __init__(self, app: ASGIApp, methods_of: Callable[[str], Sequence[str]]) -> None:
        self._app = app
        self._methods_of = methods_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            allow = ", ".join([*self._methods_of(scope["path"]), "OPTIONS"])
            await Response(status_code=204, headers={"Allow": allow})(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _name_of(host: str) -> str:
    """A `Host` header without its port; an IPv6 address without brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


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
    """Refuses bodies over the limit while they are read, announced or not, and slow ones."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        deadline = time.monotonic() + self._seconds
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            if not headers.get("expect"):  # who asks first is answered first
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._seconds):
                        await self._discard(receive, 0)
            await too_large(self._max_bytes).response()(scope, receive, send)
            return
        read, whole = 0, False

        async def receive_within_limit() -> Message:
            nonlocal read, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                    message = await receive()
                    read += len(message.get("body", b""))
                    whole = not message.get("more_body", False)
                    if read > self._max_bytes and not whole:
                        await self._discard(receive, read)
            except TimeoutError:
                raise self._too_slow() from None
            if read > self._max_bytes:
                raise too_large(self._max_bytes)
            return message

        await self._app(scope, receive_within_limit, send)

    async def _discard(self, receive: Receive, read: int) -> None:
        """Read on for a while: most clients look for an answer only when they have sent all."""
        more = True
        while more and read <= 2 * self._max_bytes:
            message = await receive()
            read += len(message.get("body", b""))
            more = message.get("more_body", False)

    def _too_slow(self) -> RestError:
        return RestError(
            408,
            f"the body did not come within {self._seconds:g} s",
            code="body_too_slow",
            headers={"Connection": "close"},
        )
