"""The chaos suite itself, against an endpoint that does as it is told."""

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from longreach.cluster.settings import DecodeSettings
from longreach.loadtest.chaos.client import Client, Outcome, parse_metrics
from longreach.loadtest.chaos.cluster import Config, attach
from longreach.loadtest.chaos.load import LONG_ANSWER, Moment, Workload, leave_at_random
from longreach.loadtest.chaos.picture import draw
from longreach.loadtest.chaos.processes import (
    Belongings,
    Kind,
    kind_of,
    peak_memory,
    reset_peak_memory,
)
from longreach.loadtest.chaos.report import COLUMNS, Row, write
from longreach.loadtest.chaos.scenarios import (
    Measured,
    Scenario,
    all_scenarios,
    choose,
    tokens_for,
)
from longreach.loadtest.chaos.suite import CannotRunError, Plan, check, run
from longreach.loadtest.prompts import PromptMaker, TextSize

from ..endpoint import Script

PAGES = 1024


@pytest.fixture
def workload(port: int) -> Workload:
    client = Client(f"http://127.0.0.1:{port}")
    return Workload(client, PromptMaker(TextSize(4.0), seed=1), (200, 400), timeout=2.0)


@pytest.fixture
def plan(port: int, tmp_path: Path) -> Plan:
    """For a cluster that is this very process and the scripted endpoint."""
    config = tmp_path / "cluster.yaml"
    config.write_text(
        f"limits: {{max_model_len: 4096}}\ningress: {{port: {port}}}\n"
        f"prefill: {{kv_cache_tokens: {128 * PAGES}}}\ndecode: {{kv_cache_tokens: {128 * PAGES}}}\n"
    )
    return Plan(config, os.getpid(), (200, 400), 2.0, seed=1)


@pytest.mark.parametrize(
    ("decode", "own"),
    [
        ({}, 2_048),
        ({"gpus": 1}, 8_192),
        ({"gpus": 0.0}, 2_048),
        ({"prefill_up_to": 300}, 300),
        ({"prefill_up_to": None}, 2_048),
        ({"prefill_up_to": 0}, 0),
    ],
)
def test_it_knows_which_prompts_a_gang_computes(decode: dict[str, float | None], own: int) -> None:
    assert Config({"decode": decode}).own_prompt_tokens == own
    assert DecodeSettings.model_validate({"kv_cache_tokens": 1, **decode}).longest_own_prompt == own


@pytest.mark.parametrize(
    ("kind", "asked"),
    [(Kind.RANK, 400), (Kind.PREFILL_REPLICA, 400), (Kind.DECODE_WORKER, 200), (Kind.PROXY, 200)],
)
def test_that_it_serves_again_is_asked_of_what_was_broken(
    workload: Workload, plan: Plan, kind: Kind, asked: int
) -> None:
    """A prompt that decode workers compute themselves says nothing of a gang."""
    cluster = attach(plan.config, os.getpid())
    cluster.config.values["decode"]["prefill_up_to"] = 300
    assert tokens_for(kind, cluster, workload) == asked


@pytest.mark.parametrize(
    ("answer", "lost", "wrong"),
    [("right", 0, 0), ("wrong", 0, 1), ("cut", 1, 0), ("error", 1, 0), ("refuse", 1, 0)],
)
def test_outcomes_are_told_apart(
    script: Script, workload: Workload, answer: str, lost: int, wrong: int
) -> None:
    script.answer = answer
    tally = workload.tally([workload.ask(200)])
    assert (tally.requests, tally.lost, tally.wrong, tally.hung) == (1, lost, wrong, 0)


def test_nobody_there_and_no_end_in_time_are_lost(script: Script, workload: Workload) -> None:
    nobody = Client("http://127.0.0.1:9")
    nobody._model = "scripted"
    gone = nobody.ask(workload.maker.make(200), 1.0)
    script.seconds = 3.0
    late = workload.ask(200)
    assert workload.tally([gone, late]).lost == 2
    assert late.seconds < 2.9, "given up after the timeout"


def test_hung_is_over_ten_seconds_more_than_alone(workload: Workload) -> None:
    workload.alone.seconds[400, LONG_ANSWER] = 20.0
    prompt = workload.maker.make(400)

    def took(seconds: float) -> Outcome:
        return Outcome(prompt, prompt.key, seconds, LONG_ANSWER)

    tally = workload.tally([took(29.9), took(30.1)])
    assert (tally.lost, tally.wrong, tally.hung) == (0, 0, 1)
    assert tally.slowest_over_alone == pytest.approx(10.1)


def test_alone_is_measured_for_each_length_and_must_be_right(
    script: Script, workload: Workload
) -> None:
    workload.measure_alone()
    assert set(workload.alone.seconds) == {(n, a) for n in (200, 400) for a in (16, LONG_ANSWER)}
    script.answer = "wrong"
    with pytest.raises(RuntimeError):
        workload.measure_alone()


def test_requests_are_under_way_when_the_block_begins(script: Script, workload: Workload) -> None:
    with workload.under_way(Moment.IDLE, 3) as asked:
        assert asked == []
    with workload.under_way(Moment.DECODE, 3) as asked:
        assert script.requests >= 1
    assert script.requests == 3
    assert workload.tally([each.result() for each in asked]).lost == 0


def test_clients_leave_before_they_are_answered(script: Script, workload: Workload) -> None:
    script.seconds = 0.6
    began = time.monotonic()
    leave_at_random(workload.client, [workload.maker.make(200) for _ in range(24)], 1, 8)
    took = time.monotonic() - began
    deadline = time.monotonic() + 20
    while script.lost_clients < 24 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert script.requests == 24
    assert script.lost_clients == 24
    assert took < 24 * 0.4, "eight at a time"


@pytest.mark.parametrize(
    ("name", "title", "kind"),
    [
        ("ray::PrefillRank", "ray::PrefillRank.begin_chunk", Kind.RANK),
        ("ray::DecodeWorke", "ray::DecodeWorker", Kind.DECODE_WORKER),
        ("x", "ray::ServeReplica:longreach:prefill.prefill", Kind.PREFILL_REPLICA),
        ("x", "ray::ServeReplica:longreach:decode", Kind.DECODE_REPLICA),
        ("x", "ray::ServeReplica:longreach:ingress", Kind.INGRESS),
        ("x", "ray::ProxyActor", Kind.PROXY),
        ("x", "ray::ServeController.listen", Kind.CONTROLLER),
        ("gcs_server", "/site-packages/ray/core/src/ray/gcs/gcs_server --log_dir", Kind.GCS),
        ("raylet", "/site-packages/ray/core/src/ray/raylet/raylet --raylet_", Kind.RAYLET),
        ("x", "ray::IDLE", None),
        ("python", "grep raylet", None),
    ],
)
def test_processes_are_known_by_their_titles(name: str, title: str, kind: Kind | None) -> None:
    assert kind_of(name, title.split()) is kind


def test_what_remains_is_named_and_can_be_ended(tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    belongings = Belongings([psutil.Process(child.pid)], {str(folder)})
    remains = belongings.remains(0.3)
    assert [each.split()[0] for each in remains.processes] == [str(child.pid)]
    assert remains.folders == [str(folder)]
    belongings.end()
    assert child.wait(5) == -signal.SIGKILL
    folder.rmdir()
    assert not belongings.remains(0.3)


def test_the_peak_of_memory_counts_from_its_reset_and_a_zombie_has_none() -> None:
    program = "a = b'x' * (1 << 28); del a; print(flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    process = psutil.Process(child.pid)
    before = peak_memory(process)
    reset_peak_memory(process)
    after = peak_memory(process)
    child.kill()
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert peak_memory(process) is None
    child.communicate()
    assert peak_memory(process) is None
    assert before is not None
    assert after is not None
    assert before > 1 << 28 > after


def test_metrics_are_summed_by_name_and_role() -> None:
    text = '# HELP a b\na_total{model_name="m",role="decode",x="1"} 2\n'
    text += 'a_total{model_name="m",role="decode",x="2"} 3.5\nb{role="ingress"} 1\nprocess 7\n'
    assert parse_metrics(text) == {("a_total", "decode"): 5.5, ("b", "ingress"): 1.0}


def test_every_kind_is_killed_and_stopped_in_every_moment_and_endings_come_last() -> None:
    names = [scenario.name for scenario in all_scenarios()]
    assert len(set(names)) == len(names)
    for kind in Kind:
        for moment in Moment:
            assert {f"kill-{kind}-{moment}", f"stop-{kind}-{moment}"} <= set(names)
    ending = [scenario.ends_cluster for scenario in all_scenarios()]
    assert ending == sorted(ending)


def test_scenarios_are_chosen_by_patterns() -> None:
    chosen = [scenario.name for scenario in choose(["storm-*", "kill-rank-idle"])]
    assert chosen == ["storm-200", "storm-2000", "storm-2000-calm", "kill-rank-idle"]
    with pytest.raises(KeyError):
        choose(["storm-200", "nonsense"])


def test_a_foreign_cluster_is_not_ended(plan: Plan) -> None:
    check(plan, choose(["storm-200"]))
    for name in ("sigterm", "kill-gcs-idle", "other-worker"):
        with pytest.raises(CannotRunError):
            check(plan, choose([name]))


def test_a_scenario_becomes_a_row(plan: Plan, script: Script) -> None:
    def leak(cluster, workload: Workload) -> Measured:
        script.usage = {"prefill": 0.0, "decode": 3 / PAGES}
        return Measured(workload.tally([workload.ask(200)]), 1.5, 2.5, "besides")

    scenario = Scenario("leak", "one", "leaks", leak, 10)
    [result] = run(plan, [scenario], "abc")
    assert result.row == Row("leak", "one", 1, 0, 0, 0, 3, 1.5, 2.5, "abc")
    assert result.measured.besides == "besides"


def test_rows_replace_older_ones_of_the_same_scenario_and_load(tmp_path: Path) -> None:
    file = tmp_path / "docs" / "chaos.csv"
    first = Row("storm-200", "200 leave", 9, 1, 0, 0, 2, 0.25, None, "abc")
    other = Row("sigterm", "decode", 3, 0, 0, 0, None, None, None, "abc")
    write(file, [first])
    write(file, [other])
    write(file, [Row("storm-200", "200 leave", 9, 0, 0, 0, 0, 0.25, 1.0, "def")])
    with file.open(newline="") as lines:
        read = list(csv.reader(lines))
    assert tuple(read[0]) == COLUMNS
    assert ",".join(COLUMNS) == (
        "scenario,load,requests,lost,wrong,hung,leaked_pages,served_again_s,ready_again_s,commit"
    )
    assert read[1:] == [
        ["sigterm", "decode", "3", "0", "0", "0", "", "", "", "abc"],
        ["storm-200", "200 leave", "9", "0", "0", "0", "0", "0.2", "1.0", "def"],
    ]


def test_the_picture_has_faults_that_requests_felt(tmp_path: Path) -> None:
    rows, picture = tmp_path / "rows.csv", tmp_path / "picture.svg"
    felt = Row("kill-rank-prefill", "prefill", 3, 1, 0, 2, 0, 2.5, 2.5, "abc")
    write(rows, [replace(felt, scenario="slow-readers")])
    with pytest.raises(ValueError, match=r"rows\.csv"):
        draw(rows, picture)
    write(rows, [felt])
    draw(rows, picture)
    assert "<svg" in picture.read_text()
