"""A client of a running endpoint: the `openai` package, plus what only Longreach says.

The progress of a long prefill comes as comments of the event stream, which the openai client
skips as it should. They are read off the bytes on their way to it.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import httpx2
import openai
from openai.types.chat import ChatCompletionMessageParam
from prometheus_client.parser import text_string_to_metric_families

from ..engine.errors import LongreachError
from ..engine.messages import Progress

_PROGRESS = re.compile(rb"^: prefill \d+% (\d+)/(\d+)")
_NO_KEY = "no-key"

Message = dict[str, str]


class EndpointError(LongreachError):
    """The endpoint cannot be reached or refused what it was asked."""


@dataclass(frozen=True)
class Answer:
    """A finished answer; times are seconds since it was asked."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    first_token: float
    finished: float


@dataclass(frozen=True)
class ServedModel:
    """A model, and how many tokens prompt and answer may have together, where that is said."""

    name: str
    max_model_len: int | None


class Endpoint:
    """A running Longreach at `base_url` (without `/v1`)."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._api_key = api_key or _NO_KEY
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx2.Client(base_url=self.base_url, headers=headers, timeout=600)

    def served(self, model: str | None = None) -> ServedModel:
        """A model that is served here, by name; the first without one.

        Raises:
            EndpointError: there is none of that name.
        """
        found = self._json(self._request("GET", "/v1/models"))["data"]
        for each in found:
            if model in (None, each["id"]):
                return ServedModel(each["id"], each.get("max_model_len"))
        names = ", ".join(each["id"] for each in found)
        raise EndpointError(f"{self.base_url} serves no model '{model}', but: {names}")

    def first_model(self) -> str:
        """The name of the model served here."""
        return self.served().name

    def count_tokens(self, model: str, messages: list[Message]) -> int:
        """How long the prompt made of these messages is, chat template included."""
        body = {"model": model, "messages": messages}
        return self._json(self._request("POST", "/tokenize", body))["count"]

    def scrape(self) -> dict[str, float]:
        """Metrics summed over roles and models: `name` or `name{stage}` -> value."""
        text = self._request("GET", "/metrics").text
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                stage = sample.labels.get("stage")
                name = f"{sample.name}{{{stage}}}" if stage else sample.name
                totals[name] = totals.get(name, 0.0) + sample.value
        return totals

    def ask(
        self,
        model: str,
        messages: list[Message],
        max_tokens: int,
        on_progress: Callable[[Progress], None],
        on_text: Callable[[str], None] = lambda text: None,
    ) -> Answer:
        """Stream one greedy chat completion.

        Raises:
            EndpointError: with what the endpoint said, or that it cannot be reached.
        """
        transport = _TappedTransport(_comment_reader(on_progress))
        with (
            openai.DefaultHttpxClient(transport=transport) as http,
            openai.OpenAI(
                base_url=f"{self.base_url}/v1",
                api_key=self._api_key,
                http_client=http,
                # A proxy in between may be slow to pass comments on; a second try would start
                # a long prefill all over again.
                timeout=httpx2.Timeout(600, connect=10),
                max_retries=0,
            ) as client,
        ):
            try:
                return _collect(client, model, messages, max_tokens, on_text)
            except openai.APIStatusError as error:
                raise EndpointError(
                    f"{self.base_url} refused with {error.status_code}: {_message(error)}"
                ) from error
            except openai.APIConnectionError as error:
                raise EndpointError(self._unreachable(error)) from error
            except openai.APIError as error:
                raise EndpointError(f"{self.base_url} gave up: {error.message}") from error

    def _request(self, method: str, path: str, body: object = None) -> httpx2.Response:
        try:
            response = self._http.request(method, path, json=body)
        except httpx2.TransportError as error:
            raise EndpointError(self._unreachable(error)) from error
        if response.is_error:
            raise EndpointError(
                f"{self.base_url}{path} answered {response.status_code}: {response.text[:500]}"
            )
        return response

    def _json(self, response: httpx2.Response):
        try:
            return response.json()
        except ValueError as error:
            raise EndpointError(
                f"{response.url} did not answer with JSON; is this a Longreach endpoint?"
            ) from error

    def _unreachable(self, error: Exception) -> str:
        return (
            f"no answer from {self.base_url} ({error.__cause__ or error}); "
            "start one with `longreach serve CONFIG`, or name another with --base-url"
        )


def _collect(
    client: openai.OpenAI,
    model: str,
    messages: list[Message],
    max_tokens: int,
    on_text: Callable[[str], None],
) -> Answer:
    started = time.monotonic()
    first_token = None
    finish_reason = None
    usage = None
    pieces: list[str] = []
    stream = client.chat.completions.create(
        model=model,
        messages=cast(list[ChatCompletionMessageParam], messages),
        max_completion_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            finish_reason = choice.finish_reason or finish_reason
            if choice.delta.content:
                first_token = first_token or time.monotonic() - started
                pieces.append(choice.delta.content)
                on_text(choice.delta.content)
    if usage is None:
        raise EndpointError("the stream ended without usage; the answer may be cut off")
    finished = time.monotonic() - started
    return Answer(
        text="".join(pieces),
        finish_reason=finish_reason,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        first_token=finished if first_token is None else first_token,
        finished=finished,
    )


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    said = body.get("message") if isinstance(body, dict) else None
    return str(said or error.message)


def _comment_reader(on_progress: Callable[[Progress], None]) -> Callable[[bytes], None]:
    """Takes the stream's bytes as they come and reports the progress comments among them."""
    rest = b""

    def read(data: bytes) -> None:
        nonlocal rest
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if found := _PROGRESS.match(line):
                on_progress(Progress(done=int(found[1]), total=int(found[2])))

    return read


class _TappedTransport(httpx2.HTTPTransport):
    """Shows the bytes of event streams to somebody else on their way."""

    def __init__(self, show: Callable[[bytes], None]) -> None:
        super().__init__()
        self._show = show

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            assert isinstance(response.stream, httpx2.SyncByteStream)
            response.stream = _TappedStream(response.stream, self._show)
        return response


class _TappedStream(httpx2.SyncByteStream):
    def __init__(self, source: httpx2.SyncByteStream, show: Callable[[bytes], None]) -> None:
        self._source = source
        self._show = show

    def __iter__(self) -> Iterator[bytes]:
        for data in self._source:
            self._show(data)
            yield data

    def close(self) -> None:
        self._source.close()
