"""What replicas say to each other about a request, beside the engine's own messages."""

from dataclasses import dataclass, field
from typing import Any

import ray

from ..engine.kv.destination import Destination
from ..engine.messages import GenerationRequest, PromptScores, Timings
from .settings import HandOffTerms


@dataclass(frozen=True)
class Standing:
    """How a gang stands to orders that gangs have taken.

    `has` are the names of those that it has itself; `takes_others`, whether it could take the rest.
    """

    has: frozenset[str]
    takes_others: bool


@dataclass(frozen=True)
class PrefillOrder:
    """What a decode replica asks of a prefill replica: compute this prompt, and send it there.

    Both promises are kept by the decode worker, so they fail when it dies.

    `destination` becomes the `Destination` of the request's pages when they are allocated. Until
    then the request is under way at the prefill replica already: replicas that are asked to stop
    finish what they have, so it stays until the request is done. `released` is kept when the
    request is over, for whatever reason. `terms` are the worker's: a gang of another configuration
    must not compute for it. `number` counts the orders of a request: an earlier one may be under
    way at the same replica.
    """

    request: GenerationRequest
    destination: "ray.ObjectRef[Any]"
    released: "ray.ObjectRef[None]"
    terms: HandOffTerms
    number: int = 0

    @property
    def name(self) -> str:
        """What it is called at a gang."""
        name = self.request.request_id
        return f"{name}-order-{self.number}" if self.number else name


def _nothing_yet() -> Timings:
    return Timings(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class AnswerOrder:
    """Whom a decode worker tells what it generates, and what it is to say besides.

    `listener` is the ingress's name, by which it fetches what is said to it. `taken` is when the
    decode replica took the request. Of a prompt that a gang has computed, `prompt` are the times,
    `prompt_there` is when its pages were, and `scores` is what the client hears first, if it asked.
    All moments are `time.time()`.
    """

    listener: str
    taken: float
    prompt: Timings = field(default_factory=_nothing_yet)
    prompt_there: float = 0.0
    scores: PromptScores | None = None


@dataclass(frozen=True)
class ComputedHere:
    """When a decode worker's own steps computed a prompt, in `time.time()`.

    `seconds` were spent in those steps, in which others got their tokens as well.
    """

    began: float
    ended: float
    seconds: float


@dataclass(frozen=True)
class Taken:
    """Which decode worker holds a request's pages: its name, and its actor's handle.

    Its `release` is how to stop the request for certain, wherever it is: Serve's cancellation is
    best effort.
    """

    worker_id: str
    worker: Any


@dataclass(frozen=True)
class WorkerDestination(Destination):
    """A request's pages in the worker behind an actor's handle; `epoch` goes with every message."""

    worker: Any
    epoch: int

    def deliver(self, message: Any) -> ray.ObjectRef:
        """Send one message; the reference is ready when its pages have arrived."""
        return self.worker.deliver.remote(self.request_id, self.epoch, message)

    def ask_back(self, message: Any) -> ray.ObjectRef:
        """Ask for pages; the reference becomes what the worker's `Receiver` answers."""
        return self.worker.send_back.remote(self.request_id, self.epoch, message)
