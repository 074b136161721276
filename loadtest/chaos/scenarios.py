"""What can be done to a cluster, one thing at a time."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial

import psutil

from .client import Outcome
from .cluster import Cluster, Overrides
from .load import Beside, Moment, Tally, Workload, leave_at_random, read_slowly, send_slowly
from .processes import Belongings, Kind, Remains, peak_memory, reset_peak_memory, send

_REQUESTS = 3
_RECOVERY_SECONDS = 150.0
_LOSS_SECONDS = 120.0
_POLL_SECONDS = 0.2
_STORM_TOKENS = 3_000
_SHORT_TOKENS = 200
_SHORT_REQUESTS = 10_000
_BODY_BYTES = 40_000_000
_BODIES = 4
_REMAIN_SECONDS = 5.0
_END_SECONDS = 60.0
_SLOW_SECONDS = 30.0
_SLOW_READERS = 16
_SLOW_SENDERS = 200
_PROBE_SECONDS = 15.0
_FATAL = (Kind.GCS, Kind.RAYLET)
_OF_GANGS = (Kind.RANK, Kind.PREFILL_REPLICA)
_OUTLIVED = (Kind.RANK, Kind.PREFILL_REPLICA, Kind.DECODE_WORKER, Kind.DECODE_REPLICA)
"""Whose death no request may notice but by waiting: its client's connection is elsewhere."""
_RANDOM_KILLS = 20
_SECONDS_A_KILL = 30.0


@dataclass(frozen=True)
class Ending:
    """How `longreach serve` ended: its exit status, None where it did not, and what was left."""

    status: int | None
    seconds: float
    remains: Remains

    def __str__(self) -> str:
        how = "still there" if self.status is None else f"ended with status {self.status}"
        left = f"left {self.remains}" if self.remains else "nothing left"
        return f"{how} after {self.seconds:.1f} s; {left}"


@dataclass(frozen=True)
class Measured:
    """What a scenario found. Seconds count from the fault; `besides` is for people."""

    tally: Tally
    served_again: float | None = None
    ready_again: float | None = None
    besides: str = ""
    ending: Ending | None = None

    @property
    def said(self) -> str:
        """All that has no column."""
        parts = (self.besides, "" if self.ending is None else str(self.ending))
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Scenario:
    """One thing that is done to a cluster.

    Attributes:
        load: what the cluster is doing meanwhile, for the table.
        does: a sentence for those who read before they run it.
        most_seconds: a bound on how long it takes, reached only when something is badly wrong.
        ends_cluster: whether `longreach serve` is meant to be gone afterwards.
        overrides: settings that it needs.
    """

    name: str
    load: str
    does: str
    run: Callable[[Cluster, Workload], Measured]
    most_seconds: float
    ends_cluster: bool = False
    overrides: Overrides = field(default_factory=dict)


def choose(patterns: Sequence[str]) -> list[Scenario]:
    """Scenarios whose name fits one of these patterns, in the order of `all_scenarios`.

    Raises:
        KeyError: a pattern fits none.
    """
    known = all_scenarios()
    for pattern in patterns:
        if not any(fnmatch(scenario.name, pattern) for scenario in known):
            raise KeyError(pattern)
    return [each for each in known if any(fnmatch(each.name, pattern) for pattern in patterns)]


def all_scenarios() -> list[Scenario]:
    """Every scenario, those that end the cluster last."""
    faults = [
        _fault(kind, number, moment)
        for kind in Kind
        for number in (signal.SIGKILL, signal.SIGSTOP)
        for moment in Moment
    ]
    lasting = [
        _storm("storm-200", 200, 8),
        _storm("storm-2000", 2_000, 8),
        _storm("storm-2000-calm", 2_000, 2),
        Scenario(
            "slow-readers",
            f"{_SLOW_READERS} slow readers",
            f"{_SLOW_READERS} clients read a byte a second of long answers, honest ones beside",
            _read_slowly,
            _SLOW_SECONDS + 120,
        ),
        Scenario(
            "slow-senders",
            f"{_SLOW_SENDERS} slow senders",
            f"{_SLOW_SENDERS} clients send a byte a second of a request, honest ones beside",
            _send_slowly,
            _SLOW_SECONDS + 120,
        ),
        Scenario(
            "large-bodies",
            f"{_BODIES} x 40 MB",
            f"{_BODIES} clients at once send {_BODY_BYTES:,} bytes of text, too long to be served",
            _post_large_bodies,
            300,
        ),
        Scenario(
            "ingress-dies",
            "8 requests",
            "the ingress is killed while it has eight requests; until pages and slots are free",
            _kill_ingress,
            _RECOVERY_SECONDS + 200,
        ),
        Scenario(
            "other-worker",
            "decode",
            "one of two decode workers is stopped; requests for the other one",
            _stop_one_worker,
            _RECOVERY_SECONDS + 200,
            overrides={"decode": {"replicas": 2}},
        ),
        Scenario(
            "random-kills",
            f"{_REQUESTS} at a time",
            f"{_RANDOM_KILLS} processes of random kinds are killed, one each "
            f"{_SECONDS_A_KILL:.0f} s, under requests of all sizes",
            _kill_at_random,
            _RANDOM_KILLS * _SECONDS_A_KILL + _RECOVERY_SECONDS + 200,
        ),
        Scenario(
            f"short-{_SHORT_REQUESTS}",
            "8 at once",
            f"{_SHORT_REQUESTS:,} short requests, and what has grown by then",
            partial(_ask_many, _SHORT_REQUESTS),
            1.0 * _SHORT_REQUESTS + 60,
        ),
    ]
    ending = [_end(number) for number in (signal.SIGTERM, signal.SIGINT)]
    lasting += [each for each in faults if not each.ends_cluster]
    return [*lasting, *ending, *(each for each in faults if each.ends_cluster)]


def _fault(kind: Kind, number: signal.Signals, moment: Moment) -> Scenario:
    verb, done = ("kill", "killed") if number is signal.SIGKILL else ("stop", "stopped")
    fatal = kind in _FATAL
    return Scenario(
        f"{verb}-{kind}-{moment}",
        moment,
        f"one {kind} is {done}, {_describe(moment)}",
        partial(_break_ray if fatal else _break, kind, number, moment),
        _LOSS_SECONDS + 60 if fatal else _RECOVERY_SECONDS + 200,
        ends_cluster=fatal,
    )


def _describe(moment: Moment) -> str:
    if moment is Moment.IDLE:
        return "with nothing under way"
    return f"with {_REQUESTS} requests under way, one of them in {moment}"


def _break(
    kind: Kind, number: signal.Signals, moment: Moment, cluster: Cluster, workload: Workload
) -> Measured:
    """Break one process of those that are replaced, and wait until everything is well."""
    with workload.under_way(moment, _REQUESTS) as asked:
        victim = cluster.tree.wait_for(kind, _RECOVERY_SECONDS)[0]
        broken_at = time.monotonic()
        send(victim, number)
        recovery = _recovery(cluster, workload, broken_at, tokens_for(kind, cluster, workload))
    # Ray's own end of a process that does not listen takes some seconds more than its replacement.
    _, missed_by_nobody = psutil.wait_procs([victim], timeout=_END_SECONDS)
    # What nobody has missed goes on, so that the next scenario begins with a whole cluster.
    send(victim, signal.SIGCONT)
    besides = "it was never replaced" if missed_by_nobody else ""
    return Measured(workload.tally([each.result() for each in asked]), *recovery, besides=besides)


def tokens_for(kind: Kind, cluster: Cluster, workload: Workload) -> int:
    """Of a prompt that is not answered without such a process; short ones never reach a gang."""
    least = cluster.config.own_prompt_tokens if kind in _OF_GANGS else 0
    return next((size for size in workload.sizes if size > least), workload.sizes[-1])


def _recovery(
    cluster: Cluster, workload: Workload, since: float, tokens: int | None = None
) -> tuple[float | None, float | None]:
    """Seconds until a request is answered right, and until `/ready` says so after that.

    Args:
        tokens: of its prompt, where not the shortest.
    """
    tokens = workload.sizes[0] if tokens is None else tokens
    deadline = since + _RECOVERY_SECONDS
    served = None
    while served is None and time.monotonic() < deadline and not cluster.has_ended():
        if workload.client.ask(workload.maker.make(tokens), _PROBE_SECONDS).is_right:
            served = time.monotonic() - since
        else:
            time.sleep(_POLL_SECONDS)
    while time.monotonic() < deadline and not cluster.has_ended():
        if workload.client.is_ready():
            return served, time.monotonic() - since
        time.sleep(_POLL_SECONDS)
    return served, None


def _break_ray(
    kind: Kind, number: signal.Signals, moment: Moment, cluster: Cluster, workload: Workload
) -> Measured:
    """Break what nobody replaces: `longreach serve` has to notice, end, and leave nothing."""
    belongings = cluster.belongings()
    with workload.under_way(moment, _REQUESTS) as asked:
        victim = cluster.tree.wait_for(kind, _RECOVERY_SECONDS)[0]
        broken_at = time.monotonic()
        send(victim, number)
        ending = _ending(cluster, belongings, broken_at)
    return Measured(workload.tally([each.result() for each in asked]), ending=ending)


def _ending(cluster: Cluster, belongings: Belongings, since: float) -> Ending:
    status = cluster.wait_for_end(_LOSS_SECONDS)
    seconds = time.monotonic() - since
    return Ending(status, seconds, belongings.remains(_REMAIN_SECONDS))


def _end(number: signal.Signals) -> Scenario:
    return Scenario(
        number.name.lower(),
        "prefill and decode",
        f"`longreach serve` gets {number.name} with {_REQUESTS} requests under way",
        partial(_ask_to_end, number),
        _LOSS_SECONDS + 60,
        ends_cluster=True,
    )


def _ask_to_end(number: signal.Signals, cluster: Cluster, workload: Workload) -> Measured:
    belongings = cluster.belongings()
    with workload.under_way(Moment.DECODE, _REQUESTS) as asked:
        asked_at = time.monotonic()
        send(cluster.tree.serve, number)
        ending = _ending(cluster, belongings, asked_at)
    return Measured(workload.tally([each.result() for each in asked]), ending=ending)


def _storm(name: str, count: int, at_once: int) -> Scenario:
    return Scenario(
        name,
        f"{count} leave, {at_once} at a time",
        f"{count:,} clients, {at_once} at a time, ask about {_STORM_TOKENS:,} tokens and leave, "
        "honest ones beside",
        partial(_leave, count, at_once),
        0.5 * count + 120,
    )


def _leave(count: int, at_once: int, cluster: Cluster, workload: Workload) -> Measured:
    prompts = [workload.maker.make(_STORM_TOKENS) for _ in range(count)]
    with Beside(workload, workload.sizes[:2]) as beside:
        leave_at_random(workload.client, prompts, count, at_once)
    return _after_load(cluster, workload, beside.outcomes)


def _after_load(cluster: Cluster, workload: Workload, outcomes: Sequence[Outcome]) -> Measured:
    """How honest requests fared, and that the cluster is well now."""
    tally = workload.tally(outcomes)
    recovery = _recovery(cluster, workload, time.monotonic())
    return Measured(
        tally, *recovery, besides=f"slowest over alone {tally.slowest_over_alone:.2f} s"
    )


def _read_slowly(cluster: Cluster, workload: Workload) -> Measured:
    prompts = [workload.maker.make(workload.sizes[0]) for _ in range(_SLOW_READERS)]
    with Beside(workload, workload.sizes[:1]) as beside:
        read_slowly(workload.client, prompts, _SLOW_SECONDS)
    return _after_load(cluster, workload, beside.outcomes)


def _send_slowly(cluster: Cluster, workload: Workload) -> Measured:
    with Beside(workload, workload.sizes[:1]) as beside:
        prompt = workload.maker.make(workload.sizes[0])
        turned_away = send_slowly(workload.client, prompt, _SLOW_SENDERS, _SLOW_SECONDS)
        health = workload.client.health_seconds()
    measured = _after_load(cluster, workload, beside.outcomes)
    said = "no answer" if health is None else f"{health * 1000:.0f} ms"
    return _adding(measured, f"{turned_away} turned away; /health {said}")


def _post_large_bodies(cluster: Cluster, workload: Workload) -> Measured:
    """Each must be refused with 400 as too long; whatever else it gets counts as lost."""
    [ingress, *_] = cluster.tree.wait_for(Kind.INGRESS, _RECOVERY_SECONDS)
    body = workload.client.completion_body("word " * (_BODY_BYTES // 5))
    reset_peak_memory(ingress)
    with Beside(workload, workload.sizes[:1]) as beside, ThreadPoolExecutor(_BODIES) as pool:
        answers = list(pool.map(lambda _: workload.client.post(body, 120), range(_BODIES)))
    peak = peak_memory(ingress)
    refused = sum(status == 400 for status, _ in answers)
    slowest = max(seconds for _, seconds in answers)
    measured = _after_load(cluster, workload, beside.outcomes)
    memory = "unknown, it died" if peak is None else f"{peak / 1e9:.2f} GB"
    return _adding(
        measured,
        f"{refused} of {_BODIES} refused, the slowest in {slowest:.1f} s; ingress's peak {memory}",
    )


def _kill_ingress(cluster: Cluster, workload: Workload) -> Measured:
    with workload.under_way(Moment.DECODE, 8) as asked:
        broken_at = time.monotonic()
        send(cluster.tree.wait_for(Kind.INGRESS, _RECOVERY_SECONDS)[0], signal.SIGKILL)
        wait(asked)
        free = _seconds_until_free(workload, broken_at)
    recovery = _recovery(cluster, workload, broken_at)
    said = "never" if free is None else f"after {free:.1f} s"
    return Measured(
        workload.tally([each.result() for each in asked]),
        *recovery,
        besides=f"pages and slots free {said}",
    )


def _seconds_until_free(workload: Workload, since: float) -> float | None:
    """Until no page is in use and nothing runs; None where that takes too long."""
    while time.monotonic() < since + _RECOVERY_SECONDS:
        metrics = workload.client.metrics()
        if metrics is not None and not any(
            value
            for (name, role), value in metrics.items()
            if name == "longreach_kv_cache_usage_perc"
            or (name == "longreach_num_requests_running" and role != "ingress")
        ):
            return time.monotonic() - since
        time.sleep(_POLL_SECONDS)
    return None


def _stop_one_worker(cluster: Cluster, workload: Workload) -> Measured:
    """Of requests that two workers share, those of the healthy one must not wait."""
    [victim, *_] = cluster.tree.wait_for(Kind.DECODE_WORKER, _RECOVERY_SECONDS)
    broken_at = time.monotonic()
    send(victim, signal.SIGSTOP)
    count, shortest = 6, workload.sizes[0]
    with ThreadPoolExecutor(count) as pool:
        outcomes = list(pool.map(workload.ask, [shortest] * count))
    recovery = _recovery(cluster, workload, broken_at)
    send(victim, signal.SIGCONT)
    answered = [outcome.seconds for outcome in outcomes if outcome.is_right]
    return Measured(
        workload.tally(outcomes),
        *recovery,
        besides=(
            f"{len(answered)} of {count} went to the other worker, the slowest took "
            f"{max(answered, default=0.0):.1f} s; alone {workload.alone.of(shortest):.1f} s"
        ),
    )


def _kill_at_random(cluster: Cluster, workload: Workload) -> Measured:
    """Each third of the load takes sizes in another order, so that they do not go in step."""
    chance = random.Random(_RANDOM_KILLS)
    sizes = workload.sizes
    killed: Counter[Kind] = Counter()
    broken_at = time.monotonic()
    with ExitStack() as stack:
        beside = [
            stack.enter_context(Beside(workload, sizes[turn % len(sizes) :] + sizes))
            for turn in range(_REQUESTS)
        ]
        for _ in range(_RANDOM_KILLS):
            broken_at = time.monotonic()
            kind = chance.choice(_OUTLIVED)
            send(chance.choice(cluster.tree.wait_for(kind, _RECOVERY_SECONDS)), signal.SIGKILL)
            killed[kind] += 1
            time.sleep(max(broken_at + _SECONDS_A_KILL - time.monotonic(), 0.0))
    outcomes = [outcome for each in beside for outcome in each.outcomes]
    tokens = tokens_for(Kind.RANK, cluster, workload)
    recovery = _recovery(cluster, workload, broken_at, tokens)
    tally = workload.tally(outcomes)
    kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(killed.items()))
    slowest = f"slowest over alone {tally.slowest_over_alone:.1f} s"
    return Measured(tally, *recovery, besides=f"killed {kinds}; {slowest}")


def _ask_many(count: int, cluster: Cluster, workload: Workload) -> Measured:
    """Memory and open files are compared with those after the first tenth."""
    first, rest = count // 10, count - count // 10
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(workload.ask, [_SHORT_TOKENS] * first))
        before = _sizes(cluster)
        outcomes += pool.map(workload.ask, [_SHORT_TOKENS] * rest)
    after = _sizes(cluster)
    grown = "; ".join(
        f"{kind} +{(after[kind][0] - size) / 1e6:.0f} MB +{after[kind][1] - files} files"
        for kind, (size, files) in before.items()
        if kind in after
    )
    return _adding(_after_load(cluster, workload, outcomes), grown)


def _sizes(cluster: Cluster) -> Mapping[Kind, tuple[int, int]]:
    """Bytes of memory and open files of the oldest process of each kind."""
    found = {kind: cluster.tree.of(kind) for kind in Kind}
    return {
        kind: (each[0].memory_info().rss, each[0].num_fds()) for kind, each in found.items() if each
    }


def _adding(measured: Measured, besides: str) -> Measured:
    return Measured(
        measured.tally,
        measured.served_again,
        measured.ready_again,
        f"{besides}; {measured.besides}",
    )
