"""Traces of Mooncake's form. The sample is our own, and not theirs."""

import json
from pathlib import Path

import pytest

from longreach.loadtest.mixed.plan import Bounds, TraceLoad, plan_trace
from longreach.loadtest.mixed.slo import Slo
from longreach.loadtest.mixed.trace import opening, read_trace
from longreach.loadtest.prompts import PromptMaker, TextSize

SAMPLE = Path(__file__).with_name("trace.jsonl")
SIZE = TextSize(4.0, 10.0)
SLO = Slo.parse("1K=1,8K=2,1M=60", 0.1)


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_the_sample_is_read_in_the_order_of_time() -> None:
    lines = read_trace(SAMPLE)
    assert [line.timestamp for line in lines] == sorted(line.timestamp for line in lines)
    assert len(lines) == 12
    assert lines[0].hash_ids[:2] == lines[3].hash_ids[:2]


def test_requests_come_as_in_the_trace_from_its_first_one_on(tmp_path: Path) -> None:
    lines = read_trace(
        write(
            tmp_path / "trace.jsonl",
            {"timestamp": 27000, "input_length": 8000, "output_length": 7},
            {"timestamp": 21000, "input_length": 900, "output_length": 3, "hash_ids": [1, 2]},
            {"timestamp": 99000, "input_length": 900, "output_length": 3},
        )
    )
    bounds = Bounds(requests=9, seconds=10.0, timeout=1.0)
    plan = plan_trace(lines, TraceLoad(2.0), 1.0, bounds, SLO)
    assert [ask.at for ask in plan.asks] == [0.0, 3.0], "the third comes too late"
    assert [ask.kind for ask in plan.asks] == ["to 1K", "to 8K"]
    assert [ask.answer_tokens for ask in plan.asks] == [3, 7]
    assert plan.asks[0].blocks == (1, 2)
    assert plan.kinds == ("to 1K", "to 8K")
    scaled = plan_trace(lines, TraceLoad(2.0), 0.125, bounds, SLO.scaled(0.125))
    assert [ask.tokens for ask in scaled.asks] == [112, 1000]
    assert len(plan_trace(lines, TraceLoad(2.0), 1.0, Bounds(1, 10.0, 1.0), SLO).asks) == 1


def test_equal_blocks_are_equal_text_and_the_rest_is_not() -> None:
    maker = PromptMaker(SIZE, seed=1)

    def prompt(blocks: tuple[int, ...]) -> str:
        return maker.make(2_000, opening(blocks, 2_000, SIZE, seed=1)).text

    one, other, third = prompt((1, 2, 3, 4)), prompt((1, 2, 3, 5)), prompt((1, 9, 3, 4))
    block = 512 * 4
    assert one[: 3 * block] == other[: 3 * block]
    assert one[3 * block :] != other[3 * block :]
    assert third[:block] == one[:block]
    assert third[block : 2 * block] != one[block : 2 * block]
    assert third[2 * block : 3 * block] == one[2 * block : 3 * block]
    assert len(one) == pytest.approx(4 * 1_990, abs=60)
    assert opening((1, 2), 600, SIZE, seed=1) == "", "nothing is whole beside key and question"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({"input_length": 8, "output_length": 7}, "timestamp"),
        ({"timestamp": -1, "input_length": 8, "output_length": 7}, "timestamp"),
        ({"timestamp": 0, "input_length": 0, "output_length": 7}, "input_length"),
        ({"timestamp": 0, "input_length": 8, "output_length": 7, "turn": 1}, "turn"),
        ("nonsense", "line 2"),
    ],
)
def test_a_line_of_another_form_is_refused(tmp_path: Path, line: object, named: str) -> None:
    good = {"timestamp": 0, "input_length": 8, "output_length": 7}
    with pytest.raises(ValueError, match=named):
        read_trace(write(tmp_path / "trace.jsonl", good, line))


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="no requests"):
        read_trace(tmp_path / "trace.jsonl")
