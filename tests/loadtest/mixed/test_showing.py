"""What people see: the board while it runs, tables, and pictures."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from longreach.loadtest.mixed.live import Board, watching
from longreach.loadtest.mixed.picture import draw_run, draw_sweep
from longreach.loadtest.mixed.plan import Bounds, ClosedLoad, Plan
from longreach.loadtest.mixed.record import Ask, FailureKind
from longreach.loadtest.mixed.slo import Slo
from longreach.loadtest.mixed.summary import summarize
from longreach.loadtest.mixed.sweep import Step
from longreach.loadtest.mixed.table import errors, plan_table, steps_table, summary_table

from .records import failed, record

SLO = Slo.parse("1K=1,8K=2", per_token=0.1)
KINDS = ("1K", "8K")
ASKS = tuple(Ask(n, None, "1K" if n else "8K", 1_000 if n else 8_000, 16) for n in range(4))
PLAN = Plan(ASKS, KINDS, ClosedLoad(2), Bounds(4, 10.0, 5.0))
RECORDS = [
    record(wait=0.25),
    record(wait=1.5),
    failed(FailureKind.STATUS, 429),
    failed(FailureKind.STATUS, 429, kind="8K", tokens=8_000),
    failed(FailureKind.CUT, kind="8K", tokens=8_000),
]


def text_of(shown: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(shown)
    return console.export_text()


def cells(text: str, first: str) -> list[str]:
    """Of the row that begins with this, without lines between."""
    [row] = [line for line in text.splitlines() if line.strip(" │┃").startswith(f"{first} ")]
    return row.replace("│", " ").split()


def test_the_board_counts_what_is_under_way_and_what_has_ended() -> None:
    board = Board(PLAN, SLO)
    for ask in ASKS[:3]:
        board.sent(ask)
    board.ended(replace(record(wait=0.25), ask=ASKS[1]))
    board.ended(replace(failed(), ask=ASKS[0], first_token=None))
    shown = text_of(board)
    assert cells(shown, "1K") == ["1K", "3", "1", "1", "1", "0", "0.25", "0.25", "0.25"]
    assert cells(shown, "8K") == ["8K", "1", "0", "1", "0", "1"]
    assert board.line().endswith("1 under way, 2 of 4 ended, 1 good, 1 failed")


def test_a_terminal_has_a_live_table_and_a_log_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longreach.loadtest.mixed.live._LINE_SECONDS", 0.0)
    seen = {}
    for is_terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=is_terminal, width=120)
        with watching(PLAN, SLO, console) as watch:
            watch.sent(ASKS[0])
            watch.ended(replace(record(), ask=ASKS[0]))
        seen[is_terminal] = file.getvalue()
    assert "under way" in seen[True]
    assert "first token s" in seen[True]
    assert len(seen[False].splitlines()) == 2


def test_the_plan_says_all_that_is_sent() -> None:
    shown = text_of(plan_table(PLAN, SLO))
    assert cells(shown, "1K") == ["1K", "3", "3,000", "48", "within", "1", "s"]
    assert cells(shown, "all") == ["all", "4", "11,000", "64"]


def test_the_summary_says_how_many_were_good_and_how_long_they_took() -> None:
    summary = summarize(RECORDS, KINDS, SLO)
    shown = text_of(summary_table(summary, "what came of it"))
    assert cells(shown, "1K")[:9] == ["1K", "1", "of", "3", "0", "1", "0.88", "1.38", "1.49"]
    assert cells(shown, "8K") == ["8K", "0", "of", "2", "0", "2"]
    assert cells(shown, "all")[:6] == ["all", "1", "of", "5", "0", "3"]
    assert errors(summary) == ["2 x status 429", "1 x stream cut off"]


def test_a_summary_fits_a_terminal_of_80_columns() -> None:
    slow = [record(wait=123.4, gaps=(0.2345, 0.2345), kind="512K-1M", tokens=1_000)] * 10
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(summary_table(summarize(slow, ["512K-1M"], SLO), "what came of it"))
    shown = console.export_text()
    times = cells(shown, "512K-1M")[6:]
    assert times == [*["123"] * 3, *["234"] * 3, *["124"] * 3]


def test_a_sweep_is_shown_by_load() -> None:
    good, bad = (summarize(each, KINDS, SLO) for each in (RECORDS[:1], RECORDS))
    shown = text_of(steps_table([Step(2.0, False, bad), Step(1.0, True, good)], "clients"))
    assert cells(shown, "1")[:2] == ["1", "100%"]
    assert cells(shown, "2")[:3] == ["2", "33%", "0%"]
    assert shown.index("yes") < shown.index("no", shown.index("yes"))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_can_be_drawn_of_anything(tmp_path: Path, suffix: str) -> None:
    for number, records in enumerate((RECORDS[:1], RECORDS, RECORDS[3:])):
        summary = summarize(records, KINDS, SLO)
        run, sweep = (tmp_path / f"{name}-{number}.{suffix}" for name in ("run", "sweep"))
        draw_run(records, summary, SLO, "title", run)
        steps = [Step(1.0, bool(number), summary), Step(2.0, False, summary)]
        draw_sweep(steps, 0.95, "clients", "title", sweep)
        assert run.stat().st_size > 1_000
        assert sweep.stat().st_size > 1_000


def test_a_picture_has_its_title_its_classes_and_its_counts(tmp_path: Path) -> None:
    path = tmp_path / "picture.svg"
    draw_run(RECORDS, summarize(RECORDS, KINDS, SLO), SLO, "on two cores", path)
    # Text is drawn as outlines, with what it says in a comment before.
    said = path.read_text()
    for text in ("on two cores", "1 of 3 good", "8K tokens", "not good", "SLO"):
        assert f"<!-- {text}" in said
