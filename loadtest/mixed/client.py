"""One request over HTTP, and when each part of its answer came."""

import asyncio
import io
from dataclasses import dataclass, field

import aiohttp

from ..endpoint import Endpoint
from ..events import ErrorEventError, Event, MalformedError, Usage, read_event
from ..prompts import says_key
from .prepare import Prepared
from .record import Failure, FailureKind, Record, Verdict

_CONNECT_SECONDS = 10.0
_LONGEST_LINE = 1 << 20
_SAID_CHARACTERS = 300


class _FailedError(Exception):
    """An answer that did not come whole."""

    def __init__(self, kind: FailureKind, said: str, status: int | None = None) -> None:
        super().__init__(said)
        self.failure = Failure(kind, said, status)


def new_session() -> aiohttp.ClientSession:
    """For any number of requests at once, each over a connection of its own.

    A connection that is used again may be closed by the other side at that very moment; that would
    look like an error of the endpoint.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        read_bufsize=_LONGEST_LINE,
    )


@dataclass
class _Heard:
    """What has come of an answer by now. Times are those of the event loop."""

    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    usage: Usage | None = None

    def add(self, event: Event, now: float) -> None:
        self.usage = event.usage or self.usage
        if not event.has_token:
            return
        self.text.append(event.text)
        if self.first is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now


async def send(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    prepared: Prepared,
    timeout: float,
    start: float,
) -> Record:
    """Ask, and hear the answer. Whatever goes wrong is in the record, being cancelled included.

    Args:
        timeout: seconds after which it is given up.
        start: of the measurement, on the event loop's clock.
    """
    clock = asyncio.get_running_loop().time
    heard, failure, sent = _Heard(), None, clock()
    try:
        async with asyncio.timeout(timeout):
            await _hear(session, endpoint, prepared.body, heard)
    except asyncio.CancelledError:
        failure = Failure(FailureKind.STOPPED, "")
    except (_FailedError, TimeoutError, aiohttp.ClientError, OSError) as error:
        failure = _failure_of(error, timeout)
    ask, usage = prepared.ask, heard.usage
    return Record(
        ask=ask,
        sent=sent - start,
        late=0.0 if ask.at is None else max(0.0, sent - start - ask.at),
        first_token=None if heard.first is None else heard.first - sent,
        gaps=tuple(heard.gaps),
        ended=clock() - sent,
        prompt_tokens=None if usage is None else usage.prompt_tokens,
        answer_tokens=None if usage is None else usage.answer_tokens,
        verdict=None if failure else _verdict("".join(heard.text), prepared.key),
        failure=failure,
    )


async def _hear(
    session: aiohttp.ClientSession, endpoint: Endpoint, body: bytes, heard: _Heard
) -> None:
    clock = asyncio.get_running_loop().time
    headers = {"Content-Type": "application/json", **endpoint.headers}
    # As a file, a body of megabytes goes out in pieces, and others' tokens come in between.
    content = io.BytesIO(body)
    url = f"{endpoint.url}/v1/chat/completions"
    async with session.post(url, data=content, headers=headers) as answer:
        if answer.status != 200:
            said = (await answer.text(errors="replace"))[:_SAID_CHARACTERS]
            raise _FailedError(FailureKind.STATUS, said, answer.status)
        while line := await _line(answer.content):
            event = _event(line)
            if event is not None:
                heard.add(event, clock())
            if event is not None and event.is_end:
                break
        else:
            raise _FailedError(FailureKind.CUT, "the stream ended without [DONE]")
    if heard.first is None:
        raise _FailedError(FailureKind.EMPTY, "the answer has no text")


async def _line(content: aiohttp.StreamReader) -> bytes:
    """The next one; empty at the end."""
    try:
        return await content.readline()
    except ValueError as error:
        raise _FailedError(FailureKind.MALFORMED, f"a line too long: {error}") from error


def _event(line: bytes) -> Event | None:
    try:
        return read_event(line.decode(errors="replace").rstrip("\r\n"))
    except ErrorEventError as error:
        raise _FailedError(FailureKind.EVENT, str(error)) from error
    except MalformedError as error:
        raise _FailedError(FailureKind.MALFORMED, str(error)) from error


def _failure_of(error: Exception, timeout: float) -> Failure:
    match error:
        case _FailedError():
            return error.failure
        case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
            return Failure(FailureKind.CONNECT, str(error))
        case TimeoutError():
            return Failure(FailureKind.TIMEOUT, f"no end within {timeout:g} s")
        case _:
            return Failure(FailureKind.CUT, f"{type(error).__name__}: {error}"[:_SAID_CHARACTERS])


def _verdict(text: str, key: str | None) -> Verdict:
    if key is None:
        return Verdict.UNCHECKED
    return Verdict.RIGHT if says_key(text, key) else Verdict.WRONG
