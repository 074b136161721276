"""A decode replica: takes requests, and lets each live through prefill and decode."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from ray.exceptions import ActorUnavailableError
from ray.serve.handle import DeploymentHandle

from ...engine.errors import (
    LongreachError,
    LostError,
    NotUpError,
    QueueFullError,
    TransferError,
    UnavailableError,
)
from ...engine.messages import GenerationRequest, Progress
from .. import metrics
from ..call_errors import CallError, as_ours
from ..messages import Taken
from ..metrics import Metrics
from ..nodes import metrics_of_node
from ..recovery import Recovery
from ..router import PrefillRouter
from ..settings import WorkerSettings
from ..streams import beating
from ..tasks import as_nobody, forever
from .other_gangs import OtherGangs
from .ranks import WorkerProcesses
from .request_life import RequestLife, State

_READY_SECONDS = 5.0
_LOOK_SECONDS = 1.0
_OTHER = "the decode replica has another model than the ingress; send the request again"
_LOST = "the decode worker is gone, and is being replaced; send the request again"

logger = logging.getLogger(__name__)


class DecodeReplica:
    """A Serve deployment. Its worker, which holds the pages, lives and dies with it.

    Args:
        gangs: as `PrefillRouter` takes them.
        most_waiting: requests for one gang, or for the worker itself, before more are refused.
        retries: as `Recovery` takes them.
    """

    async def __init__(
        self,
        settings: WorkerSettings,
        metrics_directory: Path,
        gangs: list[tuple[int, DeploymentHandle]],
        most_waiting: int,
        retries: int,
    ) -> None:
        self._sink = Metrics(metrics_of_node(metrics_directory), "decode", settings.model.name)
        self._sink.add(metrics.LOST, 0)  # a rate misses what a series begins with
        self._router = PrefillRouter(gangs)
        self._most_waiting, self._retries = most_waiting, retries
        self._terms = settings.terms
        self._other_gangs = OtherGangs(self._terms)
        self._prefills_up_to = settings.decode.longest_own_prompt
        self._lives: set[RequestLife] = set()
        self._lost = False
        self._processes = await WorkerProcesses.start(settings, metrics_directory)
        self._worker = self._processes.worker
        self._watch = forever(self._watch_worker(), self._lose)

    async def check_health(self) -> None:
        """Raise if the worker is gone, hangs or cannot generate: Serve replaces this replica."""
        if self._lost:
            raise UnavailableError(_LOST)
        await self._worker.check.remote()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `autoscaling.DecodeLoad` is made of; Serve asks by this name."""
        return await self._worker.load.remote()

    async def ready(self) -> None:
        """Return when this replica and a replica of each gang could serve; raise if not."""
        async with asyncio.timeout(_READY_SECONDS):
            await self.check_health()
            await self._router.check_health()

    async def generate(
        self, request: GenerationRequest, listener: str, model: str
    ) -> AsyncGenerator[Taken | Progress | None, None]:
        """Serve one request from its prefill to its last token.

        Args:
            model: `model.path` of who asks, which has made tokens of the prompt.

        Yields first who has taken it, then how its prompt goes on; None says that the replica is
        there. What is generated, and Finished, the worker says to the listener.
        """
        if model != self._terms.model.path:
            raise NotUpError(_OTHER)
        life = self._begin(request, listener)
        try:
            yield Taken(self._processes.worker_id, self._worker)
            async with aclosing(beating(life.events(), beat=None)) as events:
                async for event in events:
                    yield event
        except (*CallError, LongreachError) as error:
            ours = as_ours(error)
            if isinstance(ours, (LostError, TransferError)):
                await self._look_at_worker()
            raise ours from error
        finally:
            self._lives.discard(life)
            life.end()

    def _begin(self, request: GenerationRequest, listener: str) -> RequestLife:
        if self._lost:
            raise NotUpError(_LOST)
        tokens = len(request.prompt)
        # Only a gang scores a prompt's own tokens.
        here = tokens <= self._prefills_up_to and request.sampling.prompt_logprobs is None
        prefill = None if here else self._router.gang_for(tokens)
        lives = [life for life in self._lives if life.prefill is prefill]
        waiting = sum(life.state is State.WAITING for life in lives)
        # One that nobody waits in front of does not wait itself.
        if waiting > self._most_waiting:
            raise QueueFullError(waiting - 1)
        recovery = Recovery(self._retries)
        life = RequestLife(
            request,
            self._worker,
            self._terms,
            prefill,
            self._other_gangs,
            recovery,
            self._sink,
            listener,
        )
        self._lives.add(life)
        return life

    async def _look_at_worker(self) -> None:
        """Find out now if the worker is gone: requests that come again would die with it again."""
        try:
            async with asyncio.timeout(_LOOK_SECONDS):
                await as_nobody(self._worker.check.remote)
        except (TimeoutError, ActorUnavailableError):
            return  # It may be busy, and whether it hangs its pulse will show.
        except CallError as error:
            self._lose(error)

    async def _watch_worker(self) -> None:
        raise UnavailableError(await self._processes.watch(lambda: bool(self._lives)))

    def _lose(self, error: BaseException) -> None:
        """The worker cannot go on: its end tells everybody who waits for it."""
        if self._lost:
            return
        logger.error("the decode worker is lost: %s", error)
        self._lost = True
        if not isinstance(error, asyncio.CancelledError):  # as at the end of this process
            self._sink.add(metrics.LOST)
        self._processes.kill()
