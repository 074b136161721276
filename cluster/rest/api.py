"""The HTTP application: which path does what."""

import asyncio
import json
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, Response
from openai.types import Model
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Mount

from ...engine.errors import LongreachError
from ...engine.text.tokenizer import Tokenizer
from .. import metrics
from ..metrics import Metrics
from . import openapi
from .answers import ChatForm, CompletionForm, TokenTexts
from .bodies import Bodies
from .encodings import Inflater
from .errors import RestError, as_rest_error, shown, unavailable
from .form import Form
from .generation import Backend
from .limits import OPEN, Access, IngressLimits
from .meter import Meter, Running
from .middleware import (
    ApiKeys,
    BodyLimit,
    Doors,
    Failures,
    Options,
    RequestIds,
    check_media_type,
    request_id_of,
)
from .plan import Plan, check_model
from .reader import Kind, Readers
from .response import MAX_TOKENS_HEADER, AnswerResponse
from .responses_form import ResponsesForm

OPEN_PATHS = ("/health", "/ready", "/version", "/metrics", "/openapi.json", "/docs")
"""These need no API key."""

# Headers of ours that pages may read.
_EXPOSED = ("x-request-id", "retry-after", MAX_TOKENS_HEADER)
_METHODS = ("GET", "HEAD", "POST")
_CLIENT_CLOSED_REQUEST = 499  # nginx's word for it, in access logs


def build_api(
    limits: IngressLimits,
    tokenizer: Tokenizer,
    backend: Backend,
    sink: Metrics,
    render_metrics: Callable[[], bytes],
    access: Access = OPEN,
) -> FastAPI:
    """Make the application.

    Args:
        limits: what one request may ask for.
        tokenizer: of the model that is served.
        backend: generates.
        sink: where the endpoint's own figures go.
        render_metrics: what `/metrics` answers with; called in a thread.
        access: who may send requests, and from where.
    """

    def methods_of(path: str) -> list[str]:
        scope = {"type": "http", "method": "GET", "path": path}
        known = [route for route in api.routes if route.matches(scope)[0] != Match.NONE]
        found = [method for route in known for method in getattr(route, "methods", None) or ()]
        return sorted(set(found)) or [*_METHODS]

    api = FastAPI(
        title="Longreach",
        version=version("longreach"),
        middleware=_middleware(limits, access, methods_of),
        openapi_url=None,  # described by ourselves: see `openapi`
        exception_handlers={
            RestError: _answer_error,
            LongreachError: _answer_error,
            HTTPException: _answer_http_exception,
            ClientDisconnect: _answer_nobody,
        },
    )
    _add_endpoints(api, _Endpoints(limits, tokenizer, backend, sink))
    _add_pages(
        api,
        render_metrics,
        lambda: openapi.describe(api, limits, tokenizer.vocab_size, bool(access.api_keys)),
    )
    return api


def _middleware(
    limits: IngressLimits, access: Access, methods_of: Callable[[str], list[str]]
) -> list[Middleware]:
    """What a request passes through, the outermost first."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=access.origins,
        allow_methods=_METHODS,
        allow_headers=["*"],
        allow_private_network=True,
        expose_headers=_EXPOSED,
    )
    keys = Middleware(ApiKeys, keys=access.api_keys, open_paths=OPEN_PATHS)
    return [
        Middleware(RequestIds),
        Middleware(Failures),
        Middleware(Doors, hosts=access.hosts, origins=access.origins),
        *([cors] if access.origins else []),
        Middleware(Options, methods_of=methods_of),
        *([keys] if access.api_keys else []),
        Middleware(BodyLimit, max_bytes=limits.max_body_bytes, seconds=limits.receive_seconds),
    ]


def _add_endpoints(api: FastAPI, endpoints: "_Endpoints") -> None:
    api.post("/v1/chat/completions", **openapi.CHAT)(endpoints.chat)
    api.post("/v1/completions", **openapi.COMPLETION)(endpoints.completion)
    api.post("/v1/responses", **openapi.RESPONSES)(endpoints.responses)
    api.post("/tokenize", **openapi.TOKENIZE)(endpoints.tokenize)
    api.post("/detokenize", **openapi.DETOKENIZE)(endpoints.detokenize)
    _get(api, "/v1/models", endpoints.models, **openapi.MODELS)
    _get(api, "/v1/models/{name:path}", endpoints.model, **openapi.MODEL)
    _get(api, "/tokenizer_info", endpoints.tokenizer_info, **openapi.TOKENIZER_INFO)
    _get(api, "/health", endpoints.health, **openapi.STATUS)
    _get(api, "/ready", endpoints.ready, **openapi.STATUS)
    _get(api, "/version", endpoints.version, **openapi.VERSION)


def _add_pages(
    api: FastAPI, render_metrics: Callable[[], bytes], describe: Callable[[], dict[str, Any]]
) -> None:
    """What people, Prometheus and tools read about the endpoint."""

    async def scrape() -> Response:
        text = await asyncio.to_thread(render_metrics)
        return Response(text, media_type=metrics.CONTENT_TYPE)

    @cache
    def described() -> bytes:
        return json.dumps(describe()).encode()

    async def description() -> Response:
        return Response(await asyncio.to_thread(described), media_type="application/json")

    async def docs() -> Response:
        return get_swagger_ui_html(openapi_url="openapi.json", title="Longreach")

    _get(api, "/metrics", scrape, include_in_schema=False)
    _get(api, "/openapi.json", description, include_in_schema=False)
    _get(api, "/docs", docs, include_in_schema=False)


def _get(api: FastAPI, path: str, answer: Callable[..., Any], **documented: Any) -> None:
    """HEAD is answered wherever GET is."""
    api.get(path, **documented)(answer)
    api.head(path, include_in_schema=False)(answer)


def build_refusal() -> Starlette:
    """What answers in place of the application while a cluster stops: try again later."""
    refusal = unavailable("the cluster is stopping; send the request again later", "shutting_down")
    everything = Mount("/", refusal.response())
    return Starlette(routes=[everything], middleware=[Middleware(RequestIds)])


async def _answer_error(request: Request, error: Exception) -> Response:
    return as_rest_error(error, request_id_of(request.scope)).response()


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client went away within its own request; nothing that is sent arrives."""
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{shown(request.method)} {shown(request.url.path)}: {error.detail}"
    return RestError(error.status_code, what, headers=error.headers or {}).response()


_MakeForm = Callable[[Plan, str, TokenTexts], Form]


class _Endpoints:
    def __init__(
        self, limits: IngressLimits, tokenizer: Tokenizer, backend: Backend, sink: Metrics
    ) -> None:
        self._limits = limits
        self._backend = backend
        self._sink = sink
        self._readers = Readers(limits, tokenizer)
        self._bodies = Bodies(limits.max_body_bytes)
        self._texts = TokenTexts(tokenizer)
        self._tokenizer_info = tokenizer.info
        self._started = int(time.time())
        self._running = Running(sink)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, "chat", ChatForm)

    async def completion(self, request: Request) -> Response:
        return await self._generate(request, "completion", CompletionForm)

    async def responses(self, request: Request) -> Response:
        return await self._generate(request, "responses", ResponsesForm)

    async def tokenize(self, request: Request) -> Response:
        return Response(await self._read(request, "tokenize"), media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        return Response(await self._read(request, "detokenize"), media_type="application/json")

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        check_model(name, self._limits.model_name)
        return JSONResponse(self._model())

    async def tokenizer_info(self) -> Response:
        return JSONResponse(self._tokenizer_info)

    async def health(self) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self) -> Response:
        self._readers.warm_up()
        if await self._backend.ready():
            return JSONResponse({"status": "ready"})
        raise unavailable("the model is not ready yet", "not_ready", seconds=1)

    async def version(self) -> Response:
        return JSONResponse({"version": version("longreach")})

    async def _generate(
        self, request: Request, kind: Kind, form: Callable[[Plan, str, TokenTexts], Form]
    ) -> Response:
        try:
            plan = await self._read(request, kind)
        except (ClientDisconnect, asyncio.CancelledError):
            # Which of the two depends on whether the server or a proxy noticed first.
            self._sink.add(metrics.REQUESTS, outcome="cancelled")
            raise
        except Exception as error:
            refusal = as_rest_error(error, request_id_of(request.scope))
            self._sink.add(metrics.REQUESTS, outcome=refusal.outcome)
            return refusal.response()
        return AnswerResponse(
            self._backend,
            plan,
            form(plan, self._limits.model_name, self._texts),
            Meter(self._sink, self._running, plan),
            self._limits.signs_of_life,
        )

    async def _read(self, request: Request, kind: Kind) -> Any:
        """What `Reader`'s method of that name makes of the body."""
        arrived = time.time()
        check_media_type(request.headers)
        encoding = request.headers.get("content-encoding", "")
        inflater = Inflater.of(encoding, self._limits.max_body_bytes)
        async with self._bodies.of(request, inflater) as body:
            request_id = request_id_of(request.scope)
            return await self._readers.read(kind, body.parts, request_id, arrived)

    def _model(self) -> dict[str, Any]:
        model = Model.model_validate(
            {
                "id": self._limits.model_name,
                "object": "model",
                "created": self._started,
                "owned_by": "longreach",
                "max_model_len": self._limits.max_model_len,
                "max_output_tokens": self._limits.max_output_tokens,
            }
        )
        return model.model_dump(exclude_unset=True)
