"""A backend that says what it is told to, and the endpoint over it, without a cluster."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import numpy as np
from starlette.applications import Starlette

from longreach.cluster.metrics import Metrics, render
from longreach.cluster.rest import Access, IngressLimits, SignsOfLife, build_api
from longreach.cluster.rest.limits import OPEN
from longreach.engine.messages import (
    ChosenToken,
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Progress,
    PromptScores,
    Timings,
    TokenLogprob,
)
from longreach.engine.text.tokenizer import Tokenizer
from longreach.lab.pocket.tokenizer import save_tokenizer

MODEL = "pocket"
LIMITS = IngressLimits(
    MODEL, 100, 50, clamp_max_tokens=False, max_body_bytes=4096, max_choices=4,
    max_prompts=6, max_scored_tokens=64, max_logprobs=5,
    receive_seconds=120.0, signs_of_life=SignsOfLife(0.02),
)  # fmt: skip
TIMINGS = Timings(queued=0.1, prefill=0.2, hand_off=0.3, first_token=0.4, served=1.0)


class ScriptedBackend:
    """Answers every choice with `text`, a token a byte, after `prefill_seconds`.

    `error` is raised first, or after `error_after` tokens of the answer. Tokens come `at_once`
    together, with `step_seconds` between.
    """

    def __init__(self, text: str = "Yes.") -> None:
        self.text = text
        self.prefill_seconds = 0.0
        self.error: BaseException | None = None
        self.at_once = 1
        self.step_seconds = 0.0
        self.error_after: int | None = None
        self.finish_reason = "stop"
        self.is_ready = True
        self.requests: list[GenerationRequest] = []
        self.closed: list[str] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        try:
            if self.error is not None and self.error_after is None:
                raise self.error
            yield Progress(len(request.prompt) // 2, len(request.prompt))
            await asyncio.sleep(self.prefill_seconds)
            if request.sampling.prompt_logprobs is not None:
                yield scores_of(request)
            for choice in range(request.sampling.choices):
                for index, delta in enumerate(self._deltas(choice, request)):
                    if self.step_seconds and index % self.at_once == 0:
                        await asyncio.sleep(self.step_seconds)
                    yield delta
            tokens = len(self.text.encode()) * request.sampling.choices
            yield Finished(len(request.prompt), tokens, TIMINGS)
        finally:
            self.closed.append(request.request_id)

    async def ready(self) -> bool:
        return self.is_ready

    def _deltas(self, choice: int, request: GenerationRequest) -> list[Delta]:
        data = self.text.encode()
        deltas = []
        for index, byte in enumerate(data):
            if self.error is not None and index == self.error_after:
                raise self.error
            top = tuple(
                TokenLogprob(byte + i, -0.5 - i) for i in range(request.sampling.top_logprobs or 0)
            )
            last = index == len(data) - 1
            text = chr(byte) if byte < 128 else ""
            chosen = ChosenToken(byte, -0.5, top)
            deltas.append(Delta(choice, text, (chosen,), self.finish_reason if last else None))
        return deltas


def scores_of(request: GenerationRequest) -> PromptScores:
    """Each token -1 and of the second rank; others, as many as are asked for, from 65 on."""
    top = request.sampling.prompt_logprobs or 0
    row = [-1.0, 2.0, *(65 + i for i in range(top)), *(-0.5 - i for i in range(top))]
    return PromptScores(np.array([row] * (len(request.prompt) - 1), dtype=np.float32))


class Endpoint:
    """The application over a scripted backend, called in process."""

    def __init__(self, folder: Path, access: Access = OPEN, limits: IngressLimits = LIMITS) -> None:
        save_tokenizer(folder, 100)
        self.tokenizer = Tokenizer(folder)
        self.backend = ScriptedBackend()
        figures = folder / "figures"
        self.api: Starlette = build_api(
            limits,
            self.tokenizer,
            self.backend,
            Metrics(figures, "ingress", MODEL),
            lambda: render(figures),
            access,
        )

    def request(self, method: str, path: str, **arguments) -> httpx.Response:
        if method == "POST":
            headers = {"content-type": "application/json", **(arguments.get("headers") or {})}
            arguments["headers"] = headers

        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.api, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(call())

    def post(self, path: str, body: object, **arguments) -> httpx.Response:
        return self.request("POST", path, json=body, **arguments)

    def chat(self, **fields) -> httpx.Response:
        messages = [{"role": "user", "content": "Well?"}]
        return self.post("/v1/chat/completions", {"model": MODEL, "messages": messages, **fields})

    def complete(self, **fields) -> httpx.Response:
        return self.post("/v1/completions", {"model": MODEL, "prompt": "Well?", **fields})
