"""The ingress: the OpenAI endpoint of `rest`, with the decode replicas for a backend."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import cast

from fastapi import FastAPI
from ray import serve
from ray.serve.config import ControllerOptions
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ..engine.errors import CancelledElsewhereError, LongreachError
from ..engine.messages import Event, Finished, GenerationRequest, Progress
from ..engine.text.tokenizer import Tokenizer
from . import metrics
from .attempts import Attempts
from .call_errors import CallError, as_ours, first_of
from .front import FrontLimits, TakenBodies, controller_options
from .leases import LeaseKeeper
from .listener import Ear, Listener
from .messages import Taken
from .metrics import OUTCOMES, REQUESTS, Metrics, ProcessFigures, render
from .nodes import metrics_of_node, reading_here
from .recovery import was_lost
from .rest import Access, IngressLimits, SignsOfLife, build_api, read_api_keys
from .settings import IngressSettings, Settings, check_model
from .streams import listening
from .tasks import detached, tell

_READY_SECONDS = 5
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")

_Stream = DeploymentResponseGenerator[Taken | Progress | None]


class DecodeBackend:
    """Generates on whichever decode replica Serve's router chooses, and on another if it dies.

    Args:
        decode: the deployment's handle.
        model: `model.path`, of which the prompts' tokens are.
        retries: as `Attempts` takes them.
        sink: of the ingress.
    """

    def __init__(self, decode: DeploymentHandle, model: str, retries: int, sink: Metrics) -> None:
        self._decode, self._model = decode, model
        self._retries, self._sink = retries, sink
        self._streams = decode.options(stream=True)
        self._leases = LeaseKeeper()
        self._listener = Listener()
        self._tasks: set[asyncio.Task[None]] = set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """See `rest.Backend`."""
        attempts = Attempts(request, self._retries)
        while True:
            try:
                async with aclosing(self._attempt(attempts.request)) as events:
                    async for event in events:
                        if (heard := attempts.hear(event)) is not None:
                            yield heard
                return
            except LongreachError as error:
                seconds = attempts.failed(error)
                if was_lost(error):
                    self._sink.add(metrics.REQUEST_RECOVERIES)
            await asyncio.sleep(seconds)

    async def _attempt(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """What a decode replica says of the prompt, and its worker of the answer."""
        name = request.request_id
        ear = self._listener.expect(name)
        taken: Taken | None = None
        finished = False
        try:
            generate = self._streams.generate.remote
            stream = cast(_Stream, generate(request, self._listener.name, self._model))
            taken = await self._taken_by(stream, name)
            self._leases.hold(taken.worker_id, taken.worker, name)
            self._listener.listen(taken.worker_id, taken.worker, name)
            self._keep(asyncio.create_task(_overhear(stream, ear)))
            while not finished:
                event = await ear.next()
                finished = isinstance(event, Finished)
                yield event
        except CallError as error:
            raise as_ours(error) from error
        finally:
            self._listener.forget(name)
            if taken is not None:
                self._leases.drop(taken.worker_id, name)
                if not finished:
                    tell(taken.worker.release.remote, name)

    async def _taken_by(self, stream: _Stream, request_id: str) -> Taken:
        """Who has taken a request; whoever does so after its client has left is told to stop."""
        try:
            return cast(Taken, await first_of(stream))
        except BaseException:
            self._keep(detached(_release_when_taken(stream, request_id)))
            raise

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def ready(self) -> bool:
        """Whether a decode replica and the gang behind it say that they are well."""
        try:
            await asyncio.wait_for(self._decode.ready.remote(), _READY_SECONDS)
        except (*CallError, TimeoutError):
            return False
        return True


async def _overhear(stream: _Stream, ear: Ear) -> None:
    """Hear what a decode replica says of a request, to its end, or to that of whoever asked."""
    try:
        async for event in listening(stream):
            if event is not None:
                ear.hear(cast(Progress, event))
    except asyncio.CancelledError:
        ear.fail(CancelledElsewhereError())
        raise
    except Exception as error:
        ear.fail(as_ours(error))
    else:
        await ear.expect_the_end()


async def _release_when_taken(stream: _Stream, request_id: str) -> None:
    """Stop a request that no decode replica had taken yet when its client left."""
    try:
        async for message in stream:
            if isinstance(message, Taken):
                tell(message.worker.release.remote, request_id)
            else:
                # Who has taken it was said before, to whoever was cancelled: its lease lapses.
                stream.cancel()
            return
    except (*CallError, asyncio.CancelledError):
        return  # it was refused, or stopped already


def ingress_limits(settings: Settings) -> IngressLimits:
    """What the endpoint needs to know of a cluster's settings."""
    return IngressLimits(
        model_name=settings.model.name,
        max_model_len=settings.limits.max_model_len,
        max_output_tokens=settings.limits.max_output_tokens,
        clamp_max_tokens=settings.limits.clamp_max_tokens,
        max_body_bytes=settings.limits.max_body_bytes,
        max_choices=settings.limits.max_choices,
        max_prompts=settings.limits.max_prompts,
        max_scored_tokens=settings.limits.max_scored_tokens,
        max_logprobs=settings.limits.max_logprobs,
        receive_seconds=settings.limits.receive_seconds,
        signs_of_life=SignsOfLife(
            settings.ingress.progress_seconds,
            settings.ingress.empty_delta_seconds,
            settings.ingress.white_space_seconds,
        ),
    )


def api_builder(
    settings: Settings, metrics_directory: Path, decode_name: str, app_name: str
) -> Callable[[], FastAPI]:
    """What builds the endpoint within an ingress replica."""

    def build() -> FastAPI:
        folder = metrics_of_node(metrics_directory)
        with reading_here():
            check_model(settings)
            tokenizer = Tokenizer(settings.model.files.tokenizer_folder)
        sink = Metrics(folder, "ingress", settings.model.name)
        ProcessFigures(sink).start()
        for outcome in OUTCOMES:  # a rate misses what a series begins with
            sink.add(REQUESTS, 0, outcome=outcome)
        decode = serve.get_deployment_handle(decode_name, app_name)
        api = build_api(
            ingress_limits(settings),
            tokenizer,
            DecodeBackend(decode, settings.model.path, settings.limits.retries, sink),
            sink,
            partial(render, folder),
            access_of(settings.ingress),
        )
        api.add_middleware(TakenBodies)
        return api

    return build


def front_of(settings: Settings) -> ControllerOptions:
    """What has Serve's proxies put our front before this endpoint."""
    limits = settings.limits
    origins = settings.ingress.allowed_origins
    return controller_options(FrontLimits(limits.max_body_bytes, limits.receive_seconds, origins))


def access_of(settings: IngressSettings) -> Access:
    """Who may use the endpoint, and from where.

    A server for this machine alone, without keys, goes by local names only, unless others are set:
    a web page could reach it by a name of its own otherwise.

    Raises:
        ConfigurationError: the API keys cannot be read.
    """
    keys = read_api_keys(settings.api_keys_file)
    hosts = tuple(settings.allowed_hosts)
    if not hosts and not keys and settings.host in _LOCAL_NAMES:
        hosts = _LOCAL_NAMES
    return Access(keys, hosts, tuple(settings.allowed_origins))
