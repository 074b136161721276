"""The ingress: the OpenAI endpoint of `rest`, with the decode replicas for a backend."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path
from typing import cast

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ..engine.messages import Event, Finished, GenerationRequest
from ..engine.text.tokenizer import Tokenizer
from .failures import CallError, as_ours, first_of
from .leases import LeaseKeeper
from .messages import Taken
from .metrics import Metrics, render
from .rest import IngressLimits, build_api, read_api_keys
from .settings import Settings
from .tasks import detached, tell

_READY_SECONDS = 5

_Stream = DeploymentResponseGenerator[Taken | list[Event]]


class DecodeBackend:
    """Generates on whichever decode replica Serve's router chooses."""

    def __init__(self, decode: DeploymentHandle) -> None:
        self._decode = decode
        self._streams = decode.options(stream=True)
        self._leases = LeaseKeeper(f"ingress-{uuid.uuid4().hex}")
        self._leaving: set[asyncio.Task[None]] = set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """See `rest.Backend`."""
        name = request.request_id
        stream = cast(_Stream, self._streams.generate.remote(request, self._leases.holder))
        taken, finished = None, False
        try:
            taken = cast(Taken, await first_of(stream))
            self._leases.hold(taken.worker_id, taken.worker, name)
            async for message in stream:
                for event in cast(list[Event], message):
                    finished = isinstance(event, Finished)
                    yield event
        except CallError as error:
            raise as_ours(error) from error
        finally:
            if taken is None:
                leaving = detached(_release_when_taken(stream, name))
                self._leaving.add(leaving)
                leaving.add_done_callback(self._leaving.discard)
            else:
                self._leases.drop(taken.worker_id, name)
                if not finished:
                    tell(taken.worker.release.remote, name)

    async def ready(self) -> bool:
        """Whether a decode replica and the gang behind it say that they are well."""
        try:
            await asyncio.wait_for(self._decode.ready.remote(), _READY_SECONDS)
        except (*CallError, TimeoutError):
            return False
        return True


async def _release_when_taken(stream: _Stream, request_id: str) -> None:
    """Stop a request that no decode replica had taken yet when its client left."""
    try:
        async for message in stream:
            if isinstance(message, Taken):
                tell(message.worker.release.remote, request_id)
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
