"""The HTTP application: which path does what."""

import asyncio
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import openai.types
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import Mount

from ...engine.errors import LongreachError
from ...engine.text.tokenizer import Tokenizer
from .. import metrics
from ..metrics import Metrics
from .answers import AnswerFormat, ChatFormat, CompletionFormat, TokenTexts
from .errors import BUSY_SECONDS, RestError, as_rest_error
from .generation import Backend
from .limits import IngressLimits
from .meter import Meter, Running
from .middleware import ApiKeys, BodyLimit, Failures, RequestIds
from .plan import Plan, Planner
from .response import AnswerResponse
from .schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse

OPEN_PATHS = ("/health", "/ready", "/version", "/metrics")
"""These need no API key."""

_CLIENT_CLOSED_REQUEST = 499  # nginx's word for it, in access logs


def build_api(
    limits: IngressLimits,
    tokenizer: Tokenizer,
    backend: Backend,
    sink: Metrics,
    render_metrics: Callable[[], bytes],
    api_keys: Sequence[str] = (),
) -> FastAPI:
    """Make the application.

    Args:
        limits: what one request may ask for.
        tokenizer: of the model that is served.
        backend: generates.
        sink: where the endpoint's own figures go.
        render_metrics: what `/metrics` answers with; called in a thread.
        api_keys: without any, everybody is welcome.
    """
    middleware = [Middleware(RequestIds), Middleware(Failures)]
    if api_keys:
        middleware.append(Middleware(ApiKeys, keys=api_keys, open_paths=OPEN_PATHS))
    middleware.append(Middleware(BodyLimit, max_bytes=limits.max_body_bytes))
    api = FastAPI(
        title="Longreach",
        middleware=middleware,
        # Bodies are parsed by hand, so a generated page would say nothing about them.
        openapi_url=None,
        exception_handlers={
            RestError: _answer_error,
            LongreachError: _answer_error,
            HTTPException: _answer_http_exception,
            ClientDisconnect: _answer_nobody,
        },
    )
    endpoints = _Endpoints(limits, tokenizer, backend, sink)
    api.post("/v1/chat/completions")(endpoints.chat)
    api.post("/v1/completions")(endpoints.completion)
    api.post("/tokenize")(endpoints.tokenize)
    api.post("/detokenize")(endpoints.detokenize)
    api.get("/v1/models")(endpoints.models)
    api.get("/v1/models/{name:path}")(endpoints.model)
    api.get("/health")(endpoints.health)
    api.get("/ready")(endpoints.ready)
    api.get("/version")(endpoints.version)

    @api.get("/metrics")
    async def scrape() -> Response:
        text = await asyncio.to_thread(render_metrics)
        return Response(text, media_type=metrics.CONTENT_TYPE)

    return api


def build_refusal() -> Starlette:
    """What answers in place of the application while a cluster stops: try again later."""
    refusal = RestError(
        503,
        "the cluster is stopping; send the request again later",
        "server_error",
        code="shutting_down",
        headers={"Retry-After": str(BUSY_SECONDS)},
    )
    everything = Mount("/", refusal.response())
    return Starlette(routes=[everything], middleware=[Middleware(RequestIds)])


async def _answer_error(request: Request, error: Exception) -> Response:
    return as_rest_error(error).response()


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client went away within its own request; nothing that is sent arrives."""
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return RestError(error.status_code, what, headers=error.headers or {}).response()


class _Endpoints:
    def __init__(
        self, limits: IngressLimits, tokenizer: Tokenizer, backend: Backend, sink: Metrics
    ) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self._backend = backend
        self._sink = sink
        self._planner = Planner(limits, tokenizer)
        self._texts = TokenTexts(tokenizer)
        self._started = int(time.time())
        self._running = Running(sink)

    async def chat(self, request: Request) -> Response:
        def plan(body: bytes, arrived: float) -> Plan:
            return self._planner.chat(parse(ChatBody, body), arrived)

        return await self._generate(request, plan, ChatFormat)

    async def completion(self, request: Request) -> Response:
        def plan(body: bytes, arrived: float) -> Plan:
            return self._planner.completion(parse(CompletionBody, body), arrived)

        return await self._generate(request, plan, CompletionFormat)

    async def tokenize(self, request: Request) -> Response:
        return await asyncio.to_thread(self._tokenize, await request.body())

    async def detokenize(self, request: Request) -> Response:
        return await asyncio.to_thread(self._detokenize, await request.body())

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        self._planner.check_model(name)
        return JSONResponse(self._model())

    async def health(self) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self) -> Response:
        if await self._backend.ready():
            return JSONResponse({"status": "ready"})
        retry = {"Retry-After": "1"}
        raise RestError(
            503, "the model is not ready yet", "server_error", code="not_ready", headers=retry
        )

    async def version(self) -> Response:
        return JSONResponse({"version": version("longreach")})

    async def _generate(
        self,
        request: Request,
        plan_from: Callable[[bytes, float], Plan],
        form: type[AnswerFormat],
    ) -> Response:
        arrived = time.time()
        try:
            plan = await asyncio.to_thread(plan_from, await request.body(), arrived)
        except (ClientDisconnect, asyncio.CancelledError):
            # Which of the two depends on whether the server or a proxy noticed first.
            self._sink.add(metrics.REQUESTS, outcome="cancelled")
            raise
        except Exception as error:
            refusal = as_rest_error(error)
            self._sink.add(metrics.REQUESTS, outcome=refusal.outcome)
            return refusal.response()
        return AnswerResponse(
            self._backend,
            plan,
            form(plan, self._limits.model_name, self._texts),
            Meter(self._sink, self._running, plan),
            self._limits.progress_seconds,
        )

    def _tokenize(self, data: bytes) -> Response:
        body = parse(TokenizeBody, data)
        self._planner.check_model(body.model)
        if body.messages is None:
            tokens = self._tokenizer.encode(body.prompt or "")
        else:
            prompted = body.add_generation_prompt is not False
            chat = [message.for_template for message in body.messages]
            tokens = self._tokenizer.encode_chat(chat, add_generation_prompt=prompted)
        answer = {
            "count": len(tokens),
            "max_model_len": self._limits.max_model_len,
            "tokens": tokens.tolist(),
            "token_strs": None,
        }
        return JSONResponse(answer)

    def _detokenize(self, data: bytes) -> Response:
        body = parse(DetokenizeBody, data)
        self._planner.check_model(body.model)
        return JSONResponse(
            {"prompt": self._tokenizer.decode(self._planner.encode(body.tokens, "tokens"))}
        )

    def _model(self) -> dict[str, Any]:
        model = openai.types.Model.model_validate(
            {
                "id": self._limits.model_name,
                "object": "model",
                "created": self._started,
                "owned_by": "longreach",
                "max_model_len": self._limits.max_model_len,
            }
        )
        return model.model_dump(exclude_unset=True)
