"""What the endpoint measures of a request: the ingress sees it from arrival to end."""

import time

from ...engine.messages import Delta, Event, Finished
from .. import metrics
from ..metrics import Metrics, prompt_class
from .plan import Plan


class Running:
    """How many requests this ingress is working on."""

    def __init__(self, sink: Metrics) -> None:
        self._sink = sink
        self._count = 0

    def change(self, by: int) -> None:
        """One more, or one fewer."""
        self._count += by
        self._sink.set(metrics.NUM_REQUESTS_RUNNING, self._count)


class Meter:
    """Turns the events of one HTTP request into figures."""

    def __init__(self, sink: Metrics, running: Running, plan: Plan) -> None:
        self._sink = sink
        self._running = running
        self._plan = plan
        self._classes = [prompt_class(len(request.prompt)) for request in plan.requests]
        self._last_token: dict[tuple[int, int], float] = {}
        self._begun: set[int] = set()
        self._reasons: list[str] = []

    def began(self) -> None:
        """The request is on its way to the backend."""
        self._running.change(+1)

    def saw(self, index: int, event: Event) -> None:
        """An event of the prompt at `index` came."""
        match event:
            case Delta():
                self._saw_delta(index, event)
            case Finished():
                self._saw_end(index, event)

    def ended(self, outcome: str) -> None:
        """The request is over: success, rejected, invalid, cancelled or failed."""
        self._running.change(-1)
        self._sink.add(metrics.REQUESTS, outcome=outcome)
        if outcome != "success":
            return
        for reason in self._reasons:
            self._sink.add(metrics.REQUEST_SUCCESS, finished_reason=reason)
        longest = max(range(len(self._classes)), key=lambda i: len(self._plan.requests[i].prompt))
        self._sink.observe(
            metrics.E2E_REQUEST_LATENCY, self._since_arrival(), prompt_class=self._classes[longest]
        )

    def _saw_delta(self, index: int, delta: Delta) -> None:
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
        now = time.monotonic()
        before = self._last_token.get((index, delta.choice))
        self._last_token[index, delta.choice] = now
        if before is not None:
            # Several tokens at once are as many equal steps.
            step = (now - before) / len(delta.tokens)
            for _ in delta.tokens:
                self._sink.observe(metrics.INTER_TOKEN_LATENCY, step, prompt_class=label)

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
