"""`python -m longreach.loadtest.mixed`, against an endpoint that does as it is told."""

import csv
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from longreach.loadtest.mixed.__main__ import main

from ..endpoint import MODEL, Script

MIX = ("--mix", "200=3,400=1", "--slo", "200=1,400=2", "--slo-per-token", "1")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "figures"


def call(port: int, out: Path, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(main)
    fixed = ("--base-url", f"http://127.0.0.1:{port}", "--out", str(out), "--warm-up", "1")
    return CliRunner().invoke(app, [*fixed, *MIX, *arguments])


def call_and_interrupt(script: Script, after: int, port: int, out: Path, *rest: str) -> Result:
    """Ctrl-C comes when the endpoint has been asked so often."""

    def interrupt() -> None:
        while script.requests < after:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    done = call(port, out, *rest)
    thread.join()
    return done


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_a_run_says_what_it_sends_and_keeps_its_figures(
    script: Script, port: int, out: Path
) -> None:
    script.answers = ["right", "right", "right", "wrong", "right", "refuse"]
    done = call(port, out, "--concurrency", "1", "--requests", "8", "--note", "beside nothing")
    assert done.exit_code == 0, done.output
    assert script.requests == 1 + 8
    assert done.output.index("what is sent") < done.output.index("what came of it")
    kept = read(out / "run.json")
    assert kept["about"]["model"] == MODEL
    assert kept["about"]["options"]["note"] == "beside nothing"
    assert [each["kind"] for each in kept["summary"]["classes"]] == ["200", "400", "all"]
    together = kept["summary"]["classes"][-1]
    assert (together["requests"], together["good"]) == (8, 6)
    assert (together["wrong"], together["failed"], together["errors"]) == (1, 1, {"status 503": 1})
    assert len(kept["requests"]) == len(rows(out / "requests.csv")) == 8
    assert [row["class"] for row in rows(out / "summary.csv")] == ["200", "400", "all"]
    [_, _, summary] = rows(out / "summary.csv")
    assert float(summary["first_token_p50"]) == pytest.approx(
        together["first_token"]["p50"], abs=1e-6
    )
    assert summary["errors"] == "1 x status 503"
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_sends_nothing(script: Script, port: int, out: Path) -> None:
    done = call(port, out, "--rate", "1", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "what is sent" in done.output
    assert script.requests == 0
    assert not out.exists()


def test_a_sweep_finds_what_the_endpoint_can_do(script: Script, port: int, out: Path) -> None:
    """It answers two at once, 0.4 s each: three clients wait longer than 0.7 s."""
    script.seconds, script.free = 0.4, threading.Semaphore(2)
    slo = ("--slo", "400=0.7")
    done = call(port, out, "--concurrency", "1", "--sweep", "--requests", "6", *slo)
    assert done.exit_code == 0, done.output
    kept = read(out / "sweep.json")
    assert kept["highest"] == 2
    assert {step["load"]: step["holds"] for step in kept["steps"]} == {1: True, 2: True, 4: False,
                                                                      3: False}  # fmt: skip
    assert [row["load"] for row in rows(out / "summary.csv")][::3] == ["1", "2", "4", "3"]
    assert (out / "picture.png").exists()
    prompts = [body["messages"][0]["content"] for body in script.bodies]
    assert len(set(prompts)) == len(prompts), "no load has the prompts of another"


def test_a_sweep_that_the_endpoint_does_not_survive_keeps_what_was_found(
    script: Script, port: int, out: Path
) -> None:
    script.answers = ["right"] * (1 + 4 + 1) + ["refuse"] * 100
    done = call(port, out, "--concurrency", "1", "--sweep", "--requests", "4")
    assert done.exit_code == 0, done.output
    assert {step["load"]: step["holds"] for step in read(out / "sweep.json")["steps"]} == {
        1: True,
        2: False,
    }


def test_a_sweep_can_be_ended_by_hand(script: Script, port: int, out: Path) -> None:
    script.seconds = 0.1
    done = call_and_interrupt(
        script, 12, port, out, "--concurrency", "1", "--sweep", "--requests", "8"
    )
    assert done.exit_code == 0, done.output
    assert [step["load"] for step in read(out / "sweep.json")["steps"]] == [1]


@pytest.mark.parametrize(("hold", "tried"), [("0.75", True), ("0.8", False)])
def test_a_load_holds_with_exactly_the_share_asked_for(
    script: Script, port: int, out: Path, hold: str, tried: bool
) -> None:
    """Three of four in the one class are right."""
    script.answers = ["right", "right", "wrong", "right", "right"]
    one = ("--mix", "200=1", "--steps", "1", "--requests", "4")
    done = call(port, out, "--concurrency", "1", "--sweep", "--hold", hold, *one)
    assert done.exit_code == 0, done.output
    [step] = read(out / "sweep.json")["steps"]
    assert step["holds"] == tried
    assert step["summary"]["classes"][0]["requests"] == (4 if tried else 2)


def test_a_trace_is_replayed(script: Script, port: int, out: Path) -> None:
    trace = str(Path(__file__).with_name("trace.jsonl"))
    slo = ("--slo", "1K=5,64K=9")
    done = call(port, out, "--trace", trace, "--speed", "50", "--scale", "laptop", *slo)
    assert done.exit_code == 0, done.output
    kept = read(out / "run.json")
    assert kept["summary"]["classes"][-1]["good"] == 12
    assert {row["class"] for row in rows(out / "requests.csv")} == {"to 128", "to 8K"}


def test_ctrl_c_ends_it_with_what_came_by_then(script: Script, port: int, out: Path) -> None:
    script.seconds = 0.2
    done = call_and_interrupt(script, 4, port, out, "--concurrency", "1", "--requests", "1000")
    assert done.exit_code == 0, done.output
    summary = read(out / "run.json")["summary"]["classes"][-1]
    assert summary["right"] >= 2
    assert summary["errors"] == {"given up": 1}
    assert "of 1,000" in done.output


def test_ctrl_c_while_warming_up_measures_nothing(script: Script, port: int, out: Path) -> None:
    script.seconds = 0.3
    done = call_and_interrupt(script, 2, port, out, "--concurrency", "1", "--warm-up", "3")
    assert done.exit_code != 0
    assert script.requests == 2
    assert not out.exists()


def test_prompts_end_where_the_endpoint_does(script: Script, port: int, out: Path) -> None:
    script.max_model_len = 480
    long = ("--mix", "200=1,300-500=9", "--slo", "500=1", "--answer-tokens", "16")
    done = call(port, out, "--concurrency", "1", "--requests", "20", *long)
    assert done.exit_code == 0, done.output
    counted = [int(row["tokens"]) for row in rows(out / "requests.csv")]
    assert 400 < max(counted) <= 459
    too_long = call(port, out, "--concurrency", "1", "--mix", "500=1", "--slo", "500=1")
    assert too_long.exit_code == 2


def test_an_endpoint_that_answers_nothing_is_no_measurement(
    script: Script, port: int, out: Path
) -> None:
    script.answer = "refuse"
    assert call(port, out, "--rate", "5").exit_code == 1
    assert call(9, out, "--rate", "5").exit_code == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--rate", "1", "--concurrency", "1"],
        ["--rate", "0"],
        ["--concurrency", "0"],
        ["--rate", "1", "--speed", "2"],
        ["--rate", "1", "--mix", "1K"],
        ["--rate", "1", "--slo", "200=1"],
        ["--rate", "1", "--hold", "2"],
        ["--rate", "0.001", "--seconds", "1"],
        ["--trace", str(Path(__file__).with_name("trace.jsonl")), "--sweep"],
    ],
)
def test_impossible_options_are_refused(
    script: Script, port: int, out: Path, arguments: list[str]
) -> None:
    assert call(port, out, *arguments).exit_code == 2
    assert script.requests == 0
