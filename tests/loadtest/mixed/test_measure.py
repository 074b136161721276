"""Requests on their way, against an endpoint that does as it is told."""

import asyncio
import itertools
from collections.abc import Iterator

import pytest

from longreach.loadtest.endpoint import Endpoint
from longreach.loadtest.mixed.arrivals import Pattern
from longreach.loadtest.mixed.measure import measure
from longreach.loadtest.mixed.mix import Mix
from longreach.loadtest.mixed.plan import Bounds, ClosedLoad, Load, OpenLoad, Plan, plan_mix
from longreach.loadtest.mixed.prepare import Style, prepare
from longreach.loadtest.mixed.record import Ask, Record, Verdict
from longreach.loadtest.prompts import TextSize

from ..endpoint import CHARACTERS_PER_TOKEN, TEMPLATE_TOKENS, Script, scripted_endpoint

SIZE = TextSize(CHARACTERS_PER_TOKEN, TEMPLATE_TOKENS)
MIX = Mix.parse("200=3,400=1")
CHECKED = Style(check=True, whole=True)


class Told:
    """Everything that a watch is told."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []
        self.records: list[Record] = []

    def sent(self, ask: Ask) -> None:
        self.asks.append(ask)

    def ended(self, record: Record) -> None:
        self.records.append(record)


@pytest.fixture
def endpoint(port: int) -> Endpoint:
    return Endpoint(f"http://127.0.0.1:{port}/v1", api_key="secret")


def plan_of(load: OpenLoad | ClosedLoad, requests: int, seconds=30.0, timeout=10.0) -> Plan:
    return plan_mix(MIX, load, Bounds(requests, seconds, timeout), 16, seed=1)


def carry_out(
    plan: Plan, endpoint: Endpoint, style: Style = CHECKED, stop_after: float | None = None
) -> tuple[list[Record], Told]:
    """Measure, and give up after so many seconds."""
    told = Told()

    async def run() -> list[Record]:
        stop = asyncio.Event()
        if stop_after is not None:
            asyncio.get_running_loop().call_later(stop_after, stop.set)
        prepared = prepare(plan, endpoint, SIZE, style, seed=1)
        return await measure(plan, prepared, endpoint, told, stop)

    return asyncio.run(run()), told


def test_what_is_planned_is_sent_and_answered(script: Script, endpoint: Endpoint) -> None:
    records, told = carry_out(plan_of(ClosedLoad(2), 8), endpoint)
    assert [record.verdict for record in records] == [Verdict.RIGHT] * 8
    assert [record.ask.number for record in records] == list(range(8))
    assert sorted(told.asks, key=lambda ask: ask.number) == [record.ask for record in records]
    assert sorted(told.records, key=lambda record: record.ask.number) == records
    assert sorted(record.ask.kind for record in records) == ["200"] * 6 + ["400"] * 2
    for record in records:
        assert record.prompt_tokens == pytest.approx(record.ask.tokens, abs=15)
        assert record.answer_tokens == 3
    assert {headers["Authorization"] for headers in script.headers} == {"Bearer secret"}
    texts = {body["messages"][0]["content"] for body in script.bodies}
    assert len(texts) == 8, "no two prompts are the same"
    assert {body["max_tokens"] for body in script.bodies} == {16}
    assert all(body["ignore_eos"] for body in script.bodies)
    assert all(body["stream_options"] == {"include_usage": True} for body in script.bodies)


def test_comments_and_events_without_text_are_no_first_token(
    script: Script, endpoint: Endpoint
) -> None:
    """They come after 0.2 s, the first text after 0.5 s, the second one after 0.8 s."""
    script.noise, script.seconds, script.gap = True, 0.2, 0.3
    [record], _ = carry_out(plan_of(ClosedLoad(1), 1), endpoint)
    assert record.first_token is not None
    assert record.first_token >= 0.5
    assert len(record.gaps) == 1
    assert record.gaps[0] == pytest.approx(0.3, abs=0.25)
    assert record.per_token == pytest.approx(record.gaps[0] / 2), "two tokens came in one text"
    assert record.ended >= record.first_token + record.gaps[0]


@pytest.mark.parametrize(
    ("answer", "error", "has_token"),
    [
        ("cut", "stream cut off", True),
        ("error", "error in the stream", True),
        ("garbled", "malformed stream", True),
        ("empty", "no text", False),
        ("refuse", "status 503", False),
        ("drop", "stream cut off", False),
    ],
)
def test_failures_are_told_apart(
    script: Script, endpoint: Endpoint, answer: str, error: str, has_token: bool
) -> None:
    script.answer = answer
    [record], told = carry_out(plan_of(ClosedLoad(1), 1), endpoint)
    assert record.failure is not None
    assert record.failure.name == error
    assert record.verdict is None
    assert (record.first_token is not None) == has_token
    assert told.records == [record]


def test_nobody_there_is_no_connection() -> None:
    [record], _ = carry_out(plan_of(ClosedLoad(1), 1), Endpoint("http://127.0.0.1:9", "any"))
    assert record.failure is not None
    assert record.failure.name == "no connection"


def test_a_request_is_given_up_after_its_timeout(script: Script, endpoint: Endpoint) -> None:
    script.seconds = 3.0
    records, _ = carry_out(plan_of(ClosedLoad(2), 2, timeout=0.3), endpoint)
    assert [r.failure and r.failure.name for r in records] == ["timeout", "timeout"]
    assert all(0.3 <= record.ended < 2.0 for record in records)


def test_wrong_answers_are_seen_where_somebody_checks(script: Script, endpoint: Endpoint) -> None:
    script.answers = ["right", "wrong"]
    records, _ = carry_out(plan_of(ClosedLoad(1), 4), endpoint)
    assert [r.verdict for r in records] == [Verdict.RIGHT, Verdict.WRONG] * 2
    unchecked, _ = carry_out(plan_of(ClosedLoad(1), 2), endpoint, Style(False, False))
    assert [r.verdict for r in unchecked] == [Verdict.UNCHECKED] * 2
    assert "ignore_eos" not in script.bodies[-1]


def test_an_open_loop_waits_for_nobody(script: Script, endpoint: Endpoint) -> None:
    """Eight within 0.7 s, although each takes a second."""
    script.seconds = 1.0
    records, _ = carry_out(plan_of(OpenLoad(10.0, Pattern.EVEN), 8), endpoint)
    assert script.most_at_once == 8
    for number, record in enumerate(records):
        assert record.ask.at == pytest.approx(number / 10)
        assert record.sent - record.late == pytest.approx(number / 10)
        assert record.late >= 0
    distances = [after - before for before, after in itertools.pairwise(script.arrived)]
    assert sum(distances) == pytest.approx(0.7, abs=0.4)


def test_a_closed_loop_has_never_more_under_way_than_clients(
    script: Script, endpoint: Endpoint
) -> None:
    script.seconds = 0.05
    records, _ = carry_out(plan_of(ClosedLoad(3), 12), endpoint)
    assert len(records) == 12
    assert script.most_at_once == 3
    assert {record.late for record in records} == {0.0}


def test_nothing_is_sent_after_its_time(script: Script, endpoint: Endpoint) -> None:
    script.seconds = 0.1
    closed, _ = carry_out(plan_of(ClosedLoad(1), 1_000, seconds=0.5), endpoint)
    assert 1 <= len(closed) <= 6
    open_loop = plan_of(OpenLoad(10.0, Pattern.EVEN), 1_000, seconds=0.45)
    assert [ask.at for ask in open_loop.asks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match="--seconds"):
        plan_of(OpenLoad(0.001), 10, seconds=0.5)


@pytest.mark.parametrize("load", [ClosedLoad(2), OpenLoad(5.0, Pattern.EVEN)])
def test_a_measurement_that_is_stopped_keeps_what_came_by_then(
    script: Script, endpoint: Endpoint, load: OpenLoad | ClosedLoad
) -> None:
    script.answers, script.seconds = ["right"], 0.3
    records, told = carry_out(plan_of(load, 100), endpoint, stop_after=0.9)
    names = [record.failure.name if record.failure else None for record in records]
    assert set(names) == {None, "given up"}
    assert names.count("given up") <= 2
    assert len(told.asks) == len(told.records) == len(records) < 8


def test_several_loads_can_be_measured_one_after_the_other() -> None:
    script = Script()
    with scripted_endpoint(script) as port:
        endpoint = Endpoint(f"http://127.0.0.1:{port}")
        for load in loads():
            records, _ = carry_out(plan_of(load, 4), endpoint)
            assert [record.verdict for record in records] == [Verdict.RIGHT] * 4


def loads() -> Iterator[OpenLoad | ClosedLoad]:
    yield ClosedLoad(2)
    yield OpenLoad(100.0)
    yield OpenLoad(100.0, Pattern.BURSTS, 2)


def test_loads_say_what_they_are() -> None:
    said: list[Load] = [OpenLoad(0.5), OpenLoad(2.0, Pattern.BURSTS, 4), ClosedLoad(3)]
    assert [str(load) for load in said] == [
        "open loop, 0.5 requests a second, poisson",
        "open loop, 2 requests a second, in bursts of 4",
        "closed loop, 3 at once",
    ]
