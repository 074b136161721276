"""What the endpoint measures of a request: the ingress sees it from arrival to end."""

import time
from dataclasses import dataclass

from ...engine.messages import Delta, Finished
from .. import metrics
from ..metrics import Metrics, prompt_class
from .generation import Arrival
from .plan import Plan

# Tokens travel in batches. No engine makes two of one choice within this time.
_TOGETHER_SECONDS = 0.001


class Running:
    """How many requests this ingress is working on."""

    def __init__(self, sink: Metrics) -> None:
        self._sink = sink
        self._count = 0

    def change(self, by: int) -> None:
        """One more, or one fewer."""
        self._count += by
        self._sink.set(metrics.NUM_REQUESTS_RUNNING, self._count)


@dataclass
class _Burst:
    """Tokens of one choice that came together at `at`, and when those before them came."""

    at: float
    tokens: int
    since: float | None


class Meter:
    """Turns the events of one HTTP request into figures."""

    def __init__(self, sink: Metrics, running: Running, plan: Plan) -> None:
        self._sink = sink
        self._running = running
        self._plan = plan
        self._classes = [prompt_class(len(request.prompt)) for request in plan.requests]
        self._bursts: dict[tuple[int, int], _Burst] = {}
        self._begun: set[int] = set()
        self._reasons: list[str] = []

    def began(self) -> None:
        """The request is on its way to the backend."""
        self._running.change(+1)

    def saw(self, arrival: Arrival) -> None:
        """An event of a prompt came."""
        index, event = arrival.index, arrival.event
        match event:
            case Delta():
                self._saw_delta(index, event, arrival.at)
            case Finished():
                self._saw_end(index, event)

    def ended(self, outcome: str) -> None:
        """The request is over: success, rejected, invalid, cancelled or failed."""
        self._running.change(-1)
        self._sink.add(metrics.REQUESTS, outcome=outcome)
        for (index, _), burst in self._bursts.items():
            self._count_burst(burst, self._classes[index])
        if outcome != "success":
            return
        for reason in self._reasons:
            self._sink.add(metrics.REQUEST_SUCCESS, finished_reason=reason)
        longest = max(range(len(self._classes)), key=lambda i: len(self._plan.requests[i].prompt))
        self._sink.observe(
            metrics.E2E_REQUEST_LATENCY, self._since_arrival(), prompt_class=self._classes[longest]
        )

    def _saw_delta(self, index: int, delta: Delta, at: float) -> None:
        label = self._classes[index]
        if index not in self._begun:
            self._begun.add(index)
            waited = self._since_arrival()
            self._sink.observe(metrics.TIME_TO_FIRST_TOKEN, waited, prompt_class=label)
            prompt_tokens = len(self._plan.requests[index].prompt)
            self._sink.add(metrics.PROMPT_TOKENS, prompt_tokens)
        if delta.finish_reason is not None:
            self._reasons.append(delta.finish_reason)
        if not delta.tokens:
            return
        self._sink.add(metrics.GENERATION_TOKENS, len(delta.tokens))
        burst = self._bursts.get((index, delta.choice))
        if burst is not None and at - burst.at < _TOGETHER_SECONDS:
            burst.tokens += len(delta.tokens)
            return
        if burst is not None:
            self._count_burst(burst, label)
        since = None if burst is None else burst.at
        self._bursts[index, delta.choice] = _Burst(at, len(delta.tokens), since)

    def _count_burst(self, burst: "_Burst", label: str) -> None:
        """Tokens that came together were made one after the other since the last ones came."""
        if burst.since is None:
            return  # how long the first tokens took is the time to the first token
        gap = burst.at - burst.since
        self._sink.observe(metrics.INTER_CHUNK_LATENCY, gap, prompt_class=label)
        for _ in range(burst.tokens):
            self._sink.observe(metrics.INTER_TOKEN_LATENCY, gap / burst.tokens, prompt_class=label)

    def _saw_end(self, index: int, finished: Finished) -> None:
        label = self._classes[index]
        timings = finished.timings
        self._sink.observe(metrics.REQUEST_QUEUE_TIME, timings.queued, prompt_class=label)
        self._sink.observe(metrics.REQUEST_PREFILL_TIME, timings.prefill, prompt_class=label)
        self._sink.observe(metrics.REQUEST_HANDOFF_TIME, timings.hand_off, prompt_class=label)
        if timings.prefill > 0:
            speed = finished.prompt_tokens / timings.prefill
            self._sink.observe(metrics.PREFILL_TOKENS_PER_SECOND, speed, prompt_class=label)

    def _since_arrival(self) -> float:
        return max(time.time() - self._plan.arrived, 0.0)
