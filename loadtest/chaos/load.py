"""What loads the cluster: honest requests, whose answers are checked, and difficult clients."""

import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from ..prompts import SHORT_ANSWER, Prompt, PromptMaker
from .client import Client, Outcome

HUNG_SECONDS = 10.0
_POLL_SECONDS = 0.02
LONG_ANSWER = 200
"""Tokens of an answer during which there is time to break something."""

_HANDED_OFF = ("longreach_handoff_bytes_total", "decode")
_PREFILLING = ("longreach_num_requests_running", "prefill")


class Moment(StrEnum):
    """What the cluster is doing when something happens to it."""

    IDLE = "idle"
    PREFILL = "prefill"
    HAND_OFF = "hand-off"
    DECODE = "decode"


@dataclass(frozen=True)
class Tally:
    """Requests by how they ended; one that is lost may have hung as well."""

    requests: int
    lost: int
    wrong: int
    hung: int
    slowest_over_alone: float


@dataclass
class Alone:
    """Seconds that a request takes when it has the cluster to itself, by prompt and answer."""

    seconds: dict[tuple[int, int], float] = field(default_factory=dict)

    def of(self, tokens: int, answer: int = SHORT_ANSWER) -> float:
        """What was measured, or nothing: then whatever it takes counts as delay."""
        return self.seconds.get((tokens, answer), 0.0)


class Workload:
    """Prompts of a few lengths for one cluster, and how long each takes alone."""

    def __init__(
        self,
        client: Client,
        maker: PromptMaker,
        sizes: Sequence[int],
        timeout: float,
        alone: Alone | None = None,
    ) -> None:
        """
        Args:
            sizes: tokens of prompts, the shortest first.
            timeout: seconds after which a request is given up, and counts as lost and hung.
            alone: what was measured on another cluster of the same settings.
        """
        self.client = client
        self.maker = maker
        self.sizes = tuple(sizes)
        self.timeout = timeout
        self.alone = alone or Alone()

    def measure_alone(self) -> None:
        """Ask for each length by itself.

        Raises:
            RuntimeError: an answer is not right although nothing disturbs it.
        """
        for answer in (SHORT_ANSWER, LONG_ANSWER):
            for tokens in self.sizes:
                outcome = self.ask(tokens, answer)
                if not outcome.is_right:
                    raise RuntimeError(f"not right when asked alone: {outcome}")
                self.alone.seconds[tokens, answer] = outcome.seconds

    def warm_up(self) -> None:
        """Ask once for each length; what comes of it does not matter."""
        for tokens in self.sizes:
            self.ask(tokens)

    def ask(
        self,
        tokens: int,
        answer: int = SHORT_ANSWER,
        decoding: threading.Event | None = None,
    ) -> Outcome:
        """Ask for the key in a fresh prompt of about so many tokens."""
        return self.client.ask(self.maker.make(tokens), self.timeout, answer, decoding)

    @contextmanager
    def under_way(self, moment: Moment, count: int) -> Iterator["list[Future[Outcome]]"]:
        """Requests of mixed lengths, with the cluster in this moment of one of them.

        The block begins in that moment, and leaving it waits for them all.
        """
        if moment is Moment.IDLE:
            yield []
            return
        answer = LONG_ANSWER if moment is Moment.DECODE else SHORT_ANSWER
        handed_off = self._metric(_HANDED_OFF)
        with ThreadPoolExecutor(count) as pool:
            decoding = [threading.Event() for _ in range(count)]
            # The longest goes first: it is the one whose moment is waited for.
            sizes = [self.sizes[-1 - number % len(self.sizes)] for number in range(count)]
            asked = [
                pool.submit(self.ask, tokens, answer, event)
                for tokens, event in zip(sizes, decoding, strict=True)
            ]
            reached = {
                Moment.PREFILL: lambda: self._metric(_PREFILLING) > 0,
                Moment.HAND_OFF: lambda: self._metric(_HANDED_OFF) > handed_off,
                Moment.DECODE: lambda: any(event.is_set() for event in decoding),
            }[moment]
            while not reached() and not all(each.done() for each in asked):
                time.sleep(_POLL_SECONDS)
            yield asked

    def _metric(self, name: tuple[str, str]) -> float:
        return (self.client.metrics() or {}).get(name, 0.0)

    def tally(self, outcomes: Sequence[Outcome]) -> Tally:
        """Count them."""
        over = [self._over_alone(outcome) for outcome in outcomes]
        return Tally(
            requests=len(outcomes),
            lost=sum(outcome.error is not None for outcome in outcomes),
            wrong=sum(o.error is None and not o.is_right for o in outcomes),
            hung=sum(seconds > HUNG_SECONDS for seconds in over),
            slowest_over_alone=max(over, default=0.0),
        )

    def _over_alone(self, outcome: Outcome) -> float:
        tokens = outcome.prompt.tokens
        return outcome.seconds - self.alone.of(tokens, outcome.max_tokens)


class Beside:
    """One honest request after the other, beside whatever else goes on."""

    def __init__(self, workload: Workload, sizes: Sequence[int]) -> None:
        self._workload = workload
        self._sizes = tuple(sizes)
        self._ended = threading.Event()
        self.outcomes: list[Outcome] = []

    def __enter__(self) -> "Beside":
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            tokens = self._sizes[len(self.outcomes) % len(self._sizes)]
            self.outcomes.append(self._workload.ask(tokens))


def leave_at_random(client: Client, prompts: Sequence[Prompt], seed: int, at_once: int) -> None:
    """Clients that close their connection 10 to 400 ms after they asked, so many at a time."""
    chance = random.Random(seed)
    moments = [chance.uniform(0.010, 0.400) for _ in prompts]
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(client.post_and_leave, prompts, moments))


def read_slowly(client: Client, prompts: Sequence[Prompt], seconds: float) -> None:
    """Clients that ask for long answers and read one byte a second, for so long."""
    connections = [client.connect() for _ in prompts]
    try:
        for connection, prompt in zip(connections, prompts, strict=True):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.settimeout(0.01)
            connection.sendall(client.raw_chat(prompt, LONG_ANSWER))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for connection in connections:
                _read_one_byte(connection)
            time.sleep(1.0)
    finally:
        for connection in connections:
            connection.close()


def send_slowly(client: Client, prompt: Prompt, count: int, seconds: float) -> int:
    """Clients that send a request one byte a second, for so long.

    Returns:
        How many of them the endpoint has turned away by then.
    """
    request = client.raw_chat(prompt, SHORT_ANSWER)
    connections = [client.connect() for _ in range(count)]
    open_still = list(connections)
    try:
        for place in range(int(seconds)):
            open_still = [each for each in open_still if _send_one_byte(each, request, place)]
            time.sleep(1.0)
    finally:
        for connection in connections:
            connection.close()
    return count - len(open_still)


def _read_one_byte(connection: socket.socket) -> None:
    try:
        connection.recv(1)
    except OSError:
        return


def _send_one_byte(connection: socket.socket, request: bytes, place: int) -> bool:
    try:
        connection.sendall(request[place : place + 1])
    except OSError:
        return False
    return True
