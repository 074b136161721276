"""Gangs and decode replicas under a day's load, in steps of some seconds, scaled by our policy.

A gang computes one prompt after the other at a fixed speed; a decode replica holds the pages of its
sequences, and gives each its tokens at a fixed speed. Both take a while to start, because weights
are loaded. Who is to stop finishes first. Delays are as those of Serve's autoscaler.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...cluster.autoscaling import DecodeLoad, GangLoad, decode_replicas_for, gangs_for
from ...cluster.settings import AutoscalingSettings
from .trace import Prompt

STEP_SECONDS = 5.0


@dataclass(frozen=True)
class Sizes:
    """Of a cluster of Qwen2.5-7B: a gang of four H200s, and decode replicas of one.

    `gang_speed`: prompt tokens a second. `pool_tokens`: of a decode replica's pages.
    """

    gang_speed: float = 60_000.0
    answer_speed: float = 60.0
    pool_tokens: int = 2_000_000
    max_batch: int = 16
    start_seconds: float = 150.0
    max_gangs: int = 8
    max_decode: int = 8
    gang_gpus: int = 4


@dataclass
class _Gang:
    ready_at: float
    queue: deque[Prompt] = field(default_factory=deque)
    to_go: float = 0.0  # of the first in the queue
    busy: deque[float] = field(default_factory=lambda: deque(maxlen=6))

    @property
    def tokens(self) -> float:
        """That wait here, those under way included."""
        return self.to_go + sum(prompt.tokens for prompt in list(self.queue)[1:])


@dataclass
class _Decode:
    ready_at: float
    sequences: list[tuple[Prompt, float]] = field(default_factory=list)  # with its end

    @property
    def tokens(self) -> int:
        """Of pages that are held."""
        return sum(prompt.tokens + prompt.answer_tokens for prompt, _ in self.sequences)


@dataclass(frozen=True)
class Moment:
    """What there is at one time; `waiting` are prompt tokens."""

    at: float
    waiting: float
    gangs: int
    decode: int
    kv_usage: float


@dataclass(frozen=True)
class Outcome:
    """`waits`: seconds from each prompt's arrival to its first chunk."""

    moments: list[Moment]
    waits: list[float]
    gpu_hours: float
    answered: int


class _Delayed:
    """A wish for another number is followed when it has lasted."""

    def __init__(self, settings: AutoscalingSettings, most: int) -> None:
        self._settings = settings
        self._most = most
        self._since: tuple[int, float] | None = None

    def follow(self, now: int, wanted: int, at: float) -> int:
        """How many there are to be."""
        wanted = min(max(wanted, 1), self._most)
        direction = (wanted > now) - (wanted < now)
        if direction == 0:
            self._since = None
            return now
        if self._since is None or self._since[0] != direction:
            self._since = direction, at
        delay = self._settings.up_seconds if direction > 0 else self._settings.down_seconds
        if at - self._since[1] < delay:
            return now
        self._since = None
        return wanted


class Simulation:
    """Args: scaled: whether the policy is followed; else there are `max_gangs` and `max_decode`."""

    def __init__(self, sizes: Sizes, settings: AutoscalingSettings, scaled: bool = True) -> None:
        self._sizes, self._settings, self._scaled = sizes, settings, scaled
        count = 1 if scaled else sizes.max_gangs
        self._gangs = [_Gang(0.0) for _ in range(count)]
        self._decode = [_Decode(0.0) for _ in range(1 if scaled else sizes.max_decode)]
        self._leaving: list[_Gang] = []
        self._closing: list[_Decode] = []
        self._computed: deque[Prompt] = deque()
        self._want_gangs = _Delayed(settings, sizes.max_gangs)
        self._want_decode = _Delayed(settings, sizes.max_decode)
        self._waits: list[float] = []
        self._answered = 0

    def run(self, prompts: Sequence[Prompt]) -> Outcome:
        """Until everything is answered."""
        left = deque(prompts)
        moments: list[Moment] = []
        gpu_seconds = at = 0.0
        while left or self._is_busy():
            while left and left[0].at <= at:
                self._arrive(left.popleft())
            for gang in (*self._gangs, *self._leaving):
                self._compute(gang, at)
            self._generate(at)
            if self._scaled:
                self._scale(at)
            moments.append(self._moment(at))
            gangs = len(self._gangs) + len(self._leaving)
            decode = len(self._decode) + len(self._closing)
            gpu_seconds += STEP_SECONDS * (gangs * self._sizes.gang_gpus + decode)
            at += STEP_SECONDS
        hours = gpu_seconds / 3600
        return Outcome(moments, self._waits, hours, self._answered)

    def _is_busy(self) -> bool:
        gangs = any(gang.queue for gang in (*self._gangs, *self._leaving))
        return bool(gangs or self._computed or any(each.sequences for each in self._all_decode()))

    def _all_decode(self) -> list[_Decode]:
        return [*self._decode, *self._closing]

    def _arrive(self, prompt: Prompt) -> None:
        gang = min(self._gangs, key=lambda each: (each.ready_at > prompt.at, each.tokens))
        gang.queue.append(prompt)
        if len(gang.queue) == 1:
            gang.to_go = prompt.tokens

    def _compute(self, gang: _Gang, at: float) -> None:
        room = STEP_SECONDS * self._sizes.gang_speed if gang.ready_at <= at else 0.0
        used = 0.0
        while gang.queue and room > 0:
            prompt = gang.queue[0]
            if gang.to_go == prompt.tokens:
                self._waits.append(at - prompt.at)
            done = min(room, gang.to_go)
            gang.to_go -= done
            room -= done
            used += done
            if gang.to_go <= 0:
                self._computed.append(gang.queue.popleft())
                gang.to_go = gang.queue[0].tokens if gang.queue else 0.0
        gang.busy.append(used / (STEP_SECONDS * self._sizes.gang_speed))

    def _generate(self, at: float) -> None:
        for each in self._all_decode():
            ended = [one for one in each.sequences if one[1] <= at]
            self._answered += len(ended)
            each.sequences = [one for one in each.sequences if one[1] > at]
        while self._computed and (place := self._place(self._computed[0], at)) is not None:
            prompt = self._computed.popleft()
            place.sequences.append((prompt, at + prompt.answer_tokens / self._sizes.answer_speed))

    def _place(self, prompt: Prompt, at: float) -> _Decode | None:
        needed = prompt.tokens + prompt.answer_tokens
        able = [
            each
            for each in self._decode
            if each.ready_at <= at
            and each.tokens + needed <= self._sizes.pool_tokens
            and len(each.sequences) < self._sizes.max_batch
        ]
        return min(able, key=lambda each: each.tokens, default=None)

    def _scale(self, at: float) -> None:
        told = [self._load(gang, at) for gang in self._gangs]
        wanted = gangs_for(told, self._settings.queue_seconds)
        self._resize_gangs(self._want_gangs.follow(len(self._gangs), wanted, at), at)
        loads = [self._decode_load(each) for each in self._decode]
        wanted = decode_replicas_for(loads, self._settings.kv_usage)
        self._resize_decode(self._want_decode.follow(len(self._decode), wanted, at), at)

    def _load(self, gang: _Gang, at: float) -> GangLoad:
        busy = sum(gang.busy) / len(gang.busy) if gang.busy else 0.0
        speed = self._sizes.gang_speed if gang.ready_at <= at else 0.0
        return GangLoad(gang.tokens, speed, busy)

    def _decode_load(self, each: _Decode) -> DecodeLoad:
        waiting = len(self._computed) / len(self._decode)
        usage = each.tokens / self._sizes.pool_tokens
        batch = (len(each.sequences) + waiting) / self._sizes.max_batch
        return DecodeLoad(usage, len(each.sequences), waiting, batch)

    def _resize_gangs(self, count: int, at: float) -> None:
        while len(self._gangs) < count:
            self._gangs.append(_Gang(at + self._sizes.start_seconds))
        self._gangs.sort(key=lambda gang: gang.tokens, reverse=True)
        while len(self._gangs) > count:
            # What it has taken it finishes, as Serve lets it.
            self._leaving.append(self._gangs.pop())
        self._leaving = [gang for gang in self._leaving if gang.queue]

    def _resize_decode(self, count: int, at: float) -> None:
        while len(self._decode) < count:
            self._decode.append(_Decode(at + self._sizes.start_seconds))
        self._decode.sort(key=lambda each: each.tokens, reverse=True)
        while len(self._decode) > count:
            self._closing.append(self._decode.pop())
        self._closing = [each for each in self._closing if each.sequences]

    def _moment(self, at: float) -> Moment:
        waiting = sum(gang.tokens for gang in (*self._gangs, *self._leaving))
        pools = len(self._decode) * self._sizes.pool_tokens
        usage = sum(each.tokens for each in self._decode) / pools
        return Moment(at, waiting, len(self._gangs), len(self._decode), usage)
