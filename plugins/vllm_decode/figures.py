# pyright: reportMissingImports=false, reportUntypedBaseClass=false
# vLLM is installed in an environment of its own.
"""vLLM's own metrics, by its own names, kept where Longreach's are.

vLLM's logger makes its metrics of classes that whoever serves it may replace, as it does itself for
Ray. So names, meanings and buckets stay its own, of whatever version, and only where the figures go
is decided here. What vLLM's front end would count of each sequence is counted here as well, with
its own code: there is no front end.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import (
    IterationStats,
    LoRARequestStates,
    RequestStateStats,
    SchedulerStats,
)
from vllm.v1.request import Request

from ...engine.figures import Counter, Figures, Gauge, Histogram

_OURS = ("model_name",)
"""Labels that all of a process's figures have anyway."""


@dataclass(eq=False)
class _Sequence:
    """What vLLM counts of one sequence, from when it was added."""

    request: Request
    stats: RequestStateStats = field(
        default_factory=lambda: RequestStateStats(arrival_time=time.time())
    )
    cached_tokens: int = 0
    has_token: bool = False


class VllmFigures:
    """Follows vLLM's sequences and steps, and has its logger tell of them.

    One thread at a time.

    Args:
        config: vLLM's.
        figures: keeps them.
    """

    def __init__(self, config: Any, figures: Figures) -> None:
        self._logger = _Logger(config, figures)
        self._logger.log_engine_initialized()
        self._sequences: dict[str, _Sequence] = {}
        self._iteration = IterationStats()
        self._loras = LoRARequestStates()

    def began(self, request: Request) -> None:
        """A sequence was added."""
        self._sequences[request.request_id] = _Sequence(request)

    def stepped(self, outputs: EngineCoreOutputs) -> None:
        """Something came out of a step."""
        iteration = self._iteration
        iteration.iteration_timestamp = time.time()
        for output in outputs.outputs:
            self._generated(output, outputs.timestamp)
        told = outputs.outputs or iteration.finished_requests
        self._logger.record(outputs.scheduler_stats, iteration if told else None)
        self._iteration = IterationStats()

    def stand(self, stats: SchedulerStats | None) -> None:
        """How things stand after a step of which nothing came out."""
        self._logger.record(stats, None)

    def ended(self, name: str, reason: FinishReason = FinishReason.STOP) -> None:
        """A sequence has said all that it is to say; told with the step under way, or the next."""
        sequence = self._sequences.pop(name, None)
        if sequence is None:
            return
        iteration, request = self._iteration, sequence.request
        iteration.update_from_finished_request(
            finish_reason=reason,
            request_id=name,
            num_prompt_tokens=request.num_prompt_tokens,
            max_tokens_param=request.max_tokens,
            req_stats=sequence.stats,
            num_cached_tokens=sequence.cached_tokens,
        )
        said = sequence.stats.num_generation_tokens
        ParentRequest.observe_finished_request(None, iteration, said)

    def left(self, name: str) -> None:
        """A sequence was given up, which vLLM counts nowhere either."""
        self._sequences.pop(name, None)

    def _generated(self, output: EngineCoreOutput, timestamp: float) -> None:
        sequence = self._sequences.get(output.request_id)
        if sequence is None:
            return
        self._iteration.update_from_output(
            output, timestamp, not sequence.has_token, sequence.stats, self._loras, None
        )
        if output.prefill_stats is not None:
            sequence.cached_tokens = output.prefill_stats.num_cached_tokens
        sequence.has_token = True
        if output.finish_reason is not None:
            self.ended(output.request_id, output.finish_reason)


class _Logger(PrometheusStatLogger):
    """vLLM's, with other classes for its metrics: it makes all of them by these names."""

    def __init__(self, config: Any, figures: Figures) -> None:
        self._gauge_cls = partial(_GaugeOf, figures)
        self._counter_cls = partial(_CounterOf, figures)
        self._histogram_cls = partial(_HistogramOf, figures)
        super().__init__(config)


class _Series(ABC):
    """What vLLM's metrics have in common: a series for each choice of labels' values.

    What vLLM says of its own folder of figures (`multiprocess_mode`) means nothing here.
    """

    def __init__(
        self,
        figures: Figures,
        name: str,
        documentation: str,
        labelnames: Sequence[str] = (),
        **chosen: Any,
    ) -> None:
        self._figures, self._names = figures, tuple(labelnames)
        own = tuple(each for each in self._names if each not in _OURS)
        self._metric: Any = self._make(name, documentation, own, **chosen)
        self._labels: dict[str, str] = {}

    @abstractmethod
    def _make(self, name: str, documentation: str, labels: tuple[str, ...], **chosen: Any) -> Any:
        """The metric, in our words."""

    def labels(self, *values: object, **named: object) -> Any:
        """One series; from its beginning on, where it begins with nothing."""
        series = copy(self)
        given = {**dict(zip(self._names, values, strict=False)), **named}
        series._labels = {name: str(value) for name, value in given.items() if name not in _OURS}
        return series


class _CounterOf(_Series):
    def _make(self, name: str, documentation: str, labels: tuple[str, ...], **chosen: Any) -> Any:
        return Counter(f"{name.removesuffix('_total')}_total", documentation, labels)

    def labels(self, *values: object, **named: object) -> Any:
        """One series, from nothing on: a rate misses what a series begins with."""
        series = super().labels(*values, **named)
        self._figures.add(self._metric, 0, **series._labels)
        return series

    def inc(self, amount: float = 1) -> None:
        if amount:
            self._figures.add(self._metric, amount, **self._labels)


class _GaugeOf(_Series):
    """Each worker's is a series of its own: of two that are half full none is full."""

    def _make(self, name: str, documentation: str, labels: tuple[str, ...], **chosen: Any) -> Any:
        return Gauge(name, documentation, labels, merge="all")

    def set(self, value: float) -> None:
        self._figures.set(self._metric, value, **self._labels)

    def set_to_current_time(self) -> None:
        self.set(time.time())


class _HistogramOf(_Series):
    def _make(
        self,
        name: str,
        documentation: str,
        labels: tuple[str, ...],
        buckets: Sequence[float] = (),
        **chosen: Any,
    ) -> Any:
        return Histogram(name, documentation, tuple(buckets), labels)

    def observe(self, value: float) -> None:
        self._figures.observe(self._metric, value, **self._labels)
