"""The endpoint over the engine itself and the bundled model, in one process."""

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import torch

from longreach.cluster.metrics import Metrics
from longreach.cluster.rest import IngressLimits, build_api
from longreach.cluster.rest.limits import SignsOfLife
from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.decode.sampler import Logits
from longreach.engine.errors import GenerationError
from longreach.engine.kv.pages import PagePool
from longreach.engine.local import DirectHandOff, LocalPrefill
from longreach.engine.messages import Delta, Event, Finished, GenerationRequest, PromptScores
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.text.tokenizer import Tokenizer

from .backend import MODEL, TIMINGS

CONTEXT = 8192


class EngineBackend:
    """Computes one request after the other, each alone."""

    def __init__(self) -> None:
        self._prefill = LocalPrefill(CHECKPOINT, CONTEXT)
        pool = PagePool(self._prefill.pool.geometry, 4 * CONTEXT // 128, torch.device("cpu"))
        token_bytes = TokenBytes(Tokenizer(CHECKPOINT).raw)
        self._decoder = Decoder(self._prefill.model, pool, token_bytes, 4)
        self._turn = asyncio.Lock()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        async with self._turn:
            for event in self._events(request):
                yield event

    def _events(self, request: GenerationRequest) -> Iterator[Event]:
        constraint = self._decoder.prepare(request)
        self._decoder.reserve(request)
        try:
            logits, scores = self._prefilled(request)
            if scores is not None:
                yield scores
            outputs = self._decoder.start(request.request_id, logits, constraint)
            tokens = 0
            while outputs:
                for _, output in outputs:
                    if isinstance(output, GenerationError):
                        raise output
                    assert isinstance(output, Delta)
                    tokens += len(output.tokens)
                    yield output
                outputs = self._decoder.step()
            yield Finished(len(request.prompt), tokens, TIMINGS)
        finally:
            self._decoder.cancel(request.request_id)

    async def ready(self) -> bool:
        return True

    def _prefilled(self, request: GenerationRequest) -> tuple[Logits, PromptScores | None]:
        name, prompt = request.request_id, request.prompt
        top = request.sampling.prompt_logprobs
        prefiller = self._prefill.prefiller
        prefiller.admit(name, prompt)
        try:
            hand_off = DirectHandOff(self._decoder, name)
            result = prefiller.run_chunk(name, 0, len(prompt), hand_off, score_top=top)
        finally:
            prefiller.release(name)
        assert result.logits is not None
        scores = None if result.scores is None else PromptScores(result.scores[:-1].numpy())
        return result.logits.numpy(), scores


class EngineEndpoint:
    """The application over the engine, called in process; one loop for all calls."""

    def __init__(self) -> None:
        limits = IngressLimits(
            MODEL, CONTEXT, 1024, clamp_max_tokens=False, max_body_bytes=1 << 20, max_choices=4,
            max_prompts=64, max_scored_tokens=2000, max_logprobs=5,
            receive_seconds=120.0, signs_of_life=SignsOfLife(60.0),
        )  # fmt: skip
        self._loop = asyncio.new_event_loop()
        figures = Path(tempfile.mkdtemp())
        sink = Metrics(figures, "ingress", MODEL)
        self.api = build_api(limits, Tokenizer(CHECKPOINT), EngineBackend(), sink, lambda: b"")

    def post(self, path: str, body: object) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.api, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.post(path, json=body)

        return self._loop.run_until_complete(call())

    def chat(self, **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "Tell me of a man."}]
        return self.post("/v1/chat/completions", {"model": MODEL, "messages": messages, **fields})

    def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "prompt": "Tell me of a man.", **fields}
        return self.post("/v1/completions", body)
