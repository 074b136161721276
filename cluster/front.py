"""What stands between sockets and Ray Serve's proxy, in the proxy's process.

Serve makes uvicorn's server itself, and has one hook for it: a function that its proxies call when
they start, which a variable in their environment names. `controller_options` sets that variable,
and `install` is that function. It has uvicorn speak HTTP by h11, because httptools takes `Upgrade:
h2c` for an upgrade that nobody makes and loses the body, and puts middleware around the proxy.
"""

import asyncio
import json
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import uvicorn.config
from ray.serve.config import ControllerOptions
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .rest.bodies import Bodies
from .rest.errors import BUSY_SECONDS, RestError, busy, unavailable
from .rest.middleware import BodyLimit, Failures, RequestIds

# Of Ray Serve: its proxies call the function of this name.
_HOOK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
# Of Ray Serve too. Seconds between its looks at a proxy, and for an answer; three that fail make it
# start another: its own 10 and 10 leave the endpoint without one for over half a minute. Seconds
# for a proxy to start: one that takes longer than its own 5, on a starved machine, fails the whole
# start. And that it kills a replica that hangs: it would wait for its word first, as long as
# requests may take to drain, and what is to replace it has no room till then.
_SERVE = {
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "4",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
# A proxy that Serve starts gets nothing of ours but its environment.
_LIMITS = "LONGREACH_FRONT_LIMITS"
_HEADER_SECONDS = 20.0
_MOST_AWAITED = 1024
# Where in a request's scope its body goes to an ingress, and up to how many bytes it does: with the
# rest of the request that is less than what Ray sends with a call itself.
_BODY = "longreach_body"
_AHEAD_BYTES = 1 << 16
_OF_SERVE = "/-/"  # Serve's own paths: its health and its routes


@dataclass(frozen=True)
class FrontLimits:
    """Most bytes of a body, most seconds that a client may take to send one, and whose pages may
    read what is answered here; `*` stands for all.
    """

    max_body_bytes: int
    receive_seconds: float
    origins: Sequence[str] = ()


def controller_options(limits: FrontLimits) -> ControllerOptions:
    """For `serve.start`: has every proxy call `install`. Proxies keep limits while they live."""
    environment = {
        _HOOK: f"{__name__}.install",
        _LIMITS: json.dumps(asdict(limits)),
        **_SERVE,
    }
    return ControllerOptions(runtime_env={"env_vars": environment})


def install() -> list[Middleware]:
    """Called by a proxy before it makes its server; the last middleware sees a request first."""
    limits = FrontLimits(**json.loads(os.environ[_LIMITS]))
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:FrontProtocol"
    return [
        Middleware(WholeBodies, max_body_bytes=limits.max_body_bytes),
        Middleware(BodyLimit, max_bytes=limits.max_body_bytes, seconds=limits.receive_seconds),
        Middleware(ServeAnswers),
        Middleware(Failures),
        Middleware(ReadableAnswers, origins=limits.origins),
        Middleware(RequestIds),
        Middleware(Departure),
    ]


class _OfTheApplication(ABC):
    """Middleware for the application's own requests: Serve's go past it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self._app if _is_foreign(scope) else self._serve)(scope, receive, send)

    @abstractmethod
    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do with a request what this is for."""


class Departure(_OfTheApplication):
    """Counts the requests that are being read or answered, and has clients leave a proxy that goes.

    All of a process, of which draining.py learns and to which it says it.
    """

    under_way: ClassVar[int] = 0
    begun: ClassVar[bool] = False

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        Departure.under_way += 1
        try:
            await self._app(scope, receive, _with_last_answers(send))
        finally:
            Departure.under_way -= 1


def _with_last_answers(send: Send) -> Send:
    """From when the proxy is to go, each connection ends with its answer: its client comes again,
    by a new one, to a proxy that stays.
    """

    async def send_last(message: Message) -> None:
        if message["type"] == "http.response.start" and Departure.begun:
            others = [(k, v) for k, v in message.get("headers", []) if k.lower() != b"connection"]
            message = {**message, "headers": [*others, (b"connection", b"close")]}
        await send(message)

    return send_last


def depart(_: object) -> int:
    """Called in a proxy's process, with its actor: begin to have clients leave it, if that has not
    begun, and close what connections have fallen idle since; how many requests are under way.
    """
    Departure.begun = True
    FrontProtocol.close_idle()
    return Departure.under_way


class FrontProtocol(H11Protocol):
    """uvicorn's HTTP by h11, with limits on clients whose headers have not come.

    Each has so many seconds, and there may be so many of them at a time: with one more, the one
    that has taken longest is closed. Clients that are being answered are none of them.
    """

    header_seconds = _HEADER_SECONDS
    most_awaited = _MOST_AWAITED

    # Of this process.
    _open: ClassVar[set["FrontProtocol"]] = set()
    # And of these, the one that has taken longest first.
    _awaited: ClassVar[dict["FrontProtocol", None]] = {}
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a first request."""
        super().connection_made(transport)
        self._open.add(self)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._open.discard(self)
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came; of a next request that has begun, the rest of the headers is awaited."""
        super().data_received(data)
        if self._is_answering():
            self._stop_waiting()
        elif self._header_timer is None and not self.transport.is_closing():
            self._await_headers()

    @classmethod
    def close_idle(cls) -> None:
        """Close connections whose clients have their answers, and have asked nothing more.

        A client that has only just connected is about to ask, and is answered. On any thread.
        """
        for each in list(cls._open):
            each.loop.call_soon_threadsafe(each._close_if_idle)

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whether to keep a connection on which nothing more will come.

        A client that left and one that has only sent all look alike until something is written.
        Who asks by GET or HEAD is answered in any case; generating stops.
        """
        if self._is_answering() and self.scope["method"] in ("GET", "HEAD"):
            self.cycle.keep_alive = False
            return True
        return False

    def _should_upgrade(self) -> bool:
        """Nothing here speaks anything but HTTP/1; whoever offers more is answered in that."""
        return False

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _close_if_idle(self) -> None:
        has_begun_another = self._header_timer is not None or self.conn.trailing_data[0]
        if not self._is_answering() and not has_begun_another:
            self.timeout_keep_alive_handler()

    def _await_headers(self) -> None:
        self._header_timer = self.loop.call_later(self.header_seconds, self._give_up)
        self._awaited[self] = None
        if len(self._awaited) > self.most_awaited:
            next(iter(self._awaited))._give_up()

    def _stop_waiting(self) -> None:
        self._awaited.pop(self, None)
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        self._stop_waiting()
        if not self._is_answering():
            self.transport.close()


class WholeBodies(_OfTheApplication):
    """Reads a body before Serve hears of the request.

    So clients that send slowly, or never end, cost a connection and no call to an ingress, which
    gets a small body with the request, and a large one in few messages: it need not call back for
    the former. `TakenBodies` is the other end.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        super().__init__(app)
        self._bodies = Bodies(max_body_bytes)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._bodies.of(Request(scope, receive)) as body:
                parts = body.take() or [b""]
                if sum(map(len, parts)) > _AHEAD_BYTES:
                    receive = _replayed(parts, receive)
                else:
                    scope = {**scope, _BODY: b"".join(parts)}
                await self._app(scope, receive, send)
        except ClientDisconnect:
            return  # nothing that is sent arrives


class TakenBodies:
    """In an ingress: takes the body that came with its request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body: bytes | None = scope.pop(_BODY, None)
        if body is not None:
            receive = _replayed([body], receive)
        await self._app(scope, receive, send)


class ServeAnswers(_OfTheApplication):
    """Gives what Serve says by itself our errors' shape, and says something where it says nothing.

    Serve answers in plain text, and not at all where an ingress dies under a request.
    """

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "*":  # of OPTIONS; Serve's routes begin with a slash
            scope = {**scope, "path": "/", "raw_path": b"/"}
        answer = _Answer(send)
        await self._app(scope, receive, answer.send)
        if answer.refusal is not None:
            await answer.refusal.response()(scope, receive, send)
        elif answer.is_stream and not answer.is_whole:
            await answer.break_off()


class ReadableAnswers:
    """Lets pages of the allowed origins read what is refused before an ingress hears of it.

    A browser shows a page nothing of an answer without this header: an error would be a mystery.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin", "") if scope["type"] == "http" else ""
        if not origin or not {"*", origin.lower()} & self._origins:
            await self._app(scope, receive, send)
            return

        async def send_readable(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message.get("headers", [])))
                headers.setdefault("access-control-allow-origin", origin)
                headers.setdefault("access-control-expose-headers", "x-request-id, retry-after")
                headers.add_vary_header("origin")
                message = {**message, "headers": headers.raw}
            await send(message)

        await self._app(scope, receive, send_readable)


class _Answer:
    """The answer to one request, as it passes."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.refusal: RestError | None = _broken()
        self.is_stream = False
        self.is_whole = False

    async def send(self, message: Message) -> None:
        """Pass a message on, unless it is of an answer that is replaced by `refusal`."""
        if message["type"] == "http.response.start":
            headers = Headers(raw=message.get("headers", []))
            kind = headers.get("content-type", "")
            self.is_stream = kind.startswith("text/event-stream")
            of_serve = message["status"] >= 400 and kind.startswith("text/plain")
            self.refusal = _of_serve(message["status"], headers) if of_serve else None
        if self.refusal is not None:
            return
        self.is_whole = message["type"] == "http.response.body" and not message.get("more_body")
        await self._send(message)

    async def break_off(self) -> None:
        """End a stream with an error, as an ingress does."""
        said = f"data: {json.dumps(_broken().body)}\n\ndata: [DONE]\n\n".encode()
        await self._send({"type": "http.response.body", "body": said, "more_body": False})


def _of_serve(status: int, headers: Mapping[str, str]) -> RestError:
    """What Serve means by its status. It knows no path only where no application is."""
    if status == 404:
        return unavailable("no model is served here now; send the request again later", "not_ready")
    if status in (408, 429):
        seconds = headers.get("retry-after", BUSY_SECONDS)
        return busy("too much to do; try again later", seconds=seconds)
    return _broken()


def _broken() -> RestError:
    return unavailable("a part of the cluster died or is not up; send the request again")


def _is_foreign(scope: Scope) -> bool:
    """Whether a request is none of the application's."""
    return scope["type"] != "http" or scope["path"].startswith(_OF_SERVE)


def _replayed(body: Iterable[bytes], receive: Receive) -> Receive:
    """The body, at least one part, then what really comes."""
    parts = deque(body)

    async def receive_again() -> Message:
        if not parts:
            return await receive()
        part = parts.popleft()
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    return receive_again
