"""The ingress: the OpenAI endpoint of `rest`, with the decode replicas for a backend."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ..engine.messages import Event, Finished, GenerationRequest
from ..engine.text.tokenizer import Tokenizer
from .decode.replica import Taken
from .failures import CallError, as_ours, first_of
from .metrics import Metrics, render
from .outbox import Outbox, detached
from .rest import IngressLimits, build_api, read_api_keys
from .settings import Settings

_READY_SECONDS = 5

_Stream = DeploymentResponseGenerator[Taken | list[Event]]


class DecodeBackend:
    """Generates on whichever decode replica Serve's router chooses."""

    def __init__(self, decode: DeploymentHandle) -> None:
        self._decode = decode
        self._streams = decode.options(stream=True)
        self._outbox: Outbox | None = None
        self._releases: set[asyncio.Task[None]] = set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """See `rest.Backend`."""
        stream = cast(_Stream, self._streams.generate.remote(request))
        taken, finished = None, False
        try:
            taken = cast(Taken, await first_of(stream))
            async for message in stream:
                for event in cast(list[Event], message):
                    finished = isinstance(event, Finished)
                    yield event
        except CallError as error:
            raise as_ours(error) from error
        finally:
            if taken is not None and not finished:
                self._release(taken, request.request_id)
            elif taken is None:
                release = detached(self._release_when_taken(stream, request.request_id))
                self._releases.add(release)
                release.add_done_callback(self._releases.discard)

    async def ready(self) -> bool:
        """Whether a decode replica and the gang behind it say that they are well."""
        try:
            await asyncio.wait_for(self._decode.ready.remote(), _READY_SECONDS)
        except (*CallError, TimeoutError):
            return False
        return True

    def _release(self, taken: Taken, request_id: str) -> None:
        """Stop a request; one whose worker is gone has stopped."""
        # Made at the first use: there is no event loop yet where the backend is made.
        self._outbox = self._outbox or Outbox()
        self._outbox.send(lambda: cast(Any, ray.get_actor(taken.worker)).release.remote(request_id))

    async def _release_when_taken(self, stream: _Stream, request_id: str) -> None:
        """Stop a request that no decode replica had taken yet when its client left."""
        try:
            async for message in stream:
                if isinstance(message, Taken):
                    self._release(message, request_id)
                    return
        except (*CallError, asyncio.CancelledError):
            return  # it was refused, or stopped already


def ingress_limits(settings: Settings) -> IngressLimits:
    """What the endpoint needs to know of a cluster's settings."""
    return IngressLimits(
        model_name=settings.model.name,
        max_model_len=settings.limits.max_model_len,
        max_output_tokens=settings.limits.max_output_tokens,
        max_body_bytes=settings.limits.max_body_bytes,
        max_choices=settings.limits.max_choices,
        max_logprobs=settings.limits.max_logprobs,
        progress_seconds=settings.ingress.progress_seconds,
    )


def api_builder(
    settings: Settings, metrics_directory: Path, decode_name: str, app_name: str
) -> Callable[[], FastAPI]:
    """What builds the endpoint within an ingress replica."""

    def build() -> FastAPI:
        return build_api(
            ingress_limits(settings),
            Tokenizer(settings.model.files.tokenizer_folder),
            DecodeBackend(serve.get_deployment_handle(decode_name, app_name)),
            Metrics(metrics_directory, "ingress", settings.model.name),
            partial(render, metrics_directory),
            read_api_keys(settings.ingress.api_keys_file),
        )

    return build
