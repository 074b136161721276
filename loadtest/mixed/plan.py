"""What is sent, and when: bounded in count and time, the same for the same seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from .arrivals import Pattern, arrivals
from .mix import Mix
from .record import Ask
from .slo import Slo
from .trace import TraceLine


@dataclass(frozen=True)
class Bounds:
    """Where a measurement ends by itself.

    Attributes:
        requests: at most so many are sent.
        seconds: none is sent later than this after the start.
        timeout: seconds after which a request is given up.
    """

    requests: int
    seconds: float
    timeout: float


@dataclass(frozen=True)
class OpenLoad:
    """Requests come however many are under way: what many users do. `rate` is a second's."""

    rate: float
    pattern: Pattern = Pattern.POISSON
    burst: int = 8

    def __str__(self) -> str:
        come = f"in bursts of {self.burst}" if self.pattern is Pattern.BURSTS else self.pattern
        return f"open loop, {self.rate:.3g} requests a second, {come}"


@dataclass(frozen=True)
class ClosedLoad:
    """So many clients, each of which asks again when it has been answered."""

    concurrency: int

    def __str__(self) -> str:
        return f"closed loop, {self.concurrency} at once"


@dataclass(frozen=True)
class TraceLoad:
    """Requests come when they came in a trace, `speed` times as fast."""

    speed: float

    def __str__(self) -> str:
        return f"a trace at {self.speed:.3g} times its speed"


Load = OpenLoad | ClosedLoad | TraceLoad


@dataclass(frozen=True)
class Plan:
    """All requests of one measurement, in the order of their arrival.

    Attributes:
        kinds: names of the classes, that of the shortest prompts first.
    """

    asks: tuple[Ask, ...]
    kinds: tuple[str, ...]
    load: Load
    bounds: Bounds

    @property
    def most_seconds(self) -> float:
        """After which it is over, whatever the endpoint does."""
        return self.bounds.seconds + self.bounds.timeout


def plan_mix(
    mix: Mix, load: OpenLoad | ClosedLoad, bounds: Bounds, answer_tokens: int, seed: int
) -> Plan:
    """Requests of this mix.

    Raises:
        ValueError: none arrives in time.
    """
    moments = _moments(load, bounds, seed)
    drawn = mix.draw(len(moments), seed)
    asks = tuple(
        Ask(number, moment, kind.name, tokens, answer_tokens)
        for number, (moment, (kind, tokens)) in enumerate(zip(moments, drawn, strict=True))
    )
    return Plan(asks, tuple(each.name for each in mix.classes), load, bounds)


def plan_trace(
    lines: Sequence[TraceLine], load: TraceLoad, scale: float, bounds: Bounds, slo: Slo
) -> Plan:
    """Requests as a trace has them, those that come in time; its first one comes at once.

    Args:
        lines: by their timestamps.
        scale: of prompts' lengths.

    Raises:
        ValueError: a prompt has a length that the SLO has no limit for.
    """
    begin = lines[0].timestamp
    asks: list[Ask] = []
    for line in lines[: bounds.requests]:
        moment = (line.timestamp - begin) / 1000 / load.speed
        if moment > bounds.seconds:
            break
        tokens = max(1, round(line.input_length * scale))
        kind = slo.class_of(tokens)
        asks.append(Ask(len(asks), moment, kind, tokens, line.output_length, line.hash_ids))
    shortest_first = sorted(asks, key=lambda ask: ask.tokens)
    return Plan(tuple(asks), tuple(dict.fromkeys(a.kind for a in shortest_first)), load, bounds)


def _moments(load: OpenLoad | ClosedLoad, bounds: Bounds, seed: int) -> Sequence[float | None]:
    if isinstance(load, ClosedLoad):
        return [None] * bounds.requests
    coming = islice(arrivals(load.pattern, load.rate, load.burst, seed), bounds.requests)
    moments = list(takewhile(lambda moment: moment <= bounds.seconds, coming))
    if not moments:
        raise ValueError(
            f"at {load.rate:.3g} requests a second none comes within {bounds.seconds:.0f} s; "
            "raise --seconds or the load"
        )
    return moments
