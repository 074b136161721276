"""Runs that are interrupted, resumed and refused; summaries and pictures of them."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from longreach.engine.errors import ConfigurationError, InvalidRequestError, LongreachError
from longreach.engine.messages import Progress
from longreach.lab.evaluation import picture
from longreach.lab.evaluation.answerer import Answer, Answerer, OnProgress, TokenCount
from longreach.lab.evaluation.intervals import wilson
from longreach.lab.evaluation.records import RecordFile, add_records, read_records
from longreach.lab.evaluation.ruler import RULER
from longreach.lab.evaluation.running import Grid, run
from longreach.lab.evaluation.summary import Summary
from longreach.lab.evaluation.tasks import NEEDLES


class Parrot(Answerer):
    """Says the numbers of the prompt in its "good" variant, and breaks after some prompts."""

    def __init__(self, answers_before_it_breaks: int = 10**6) -> None:
        self.asked: list[tuple[str, str]] = []
        self._left = answers_before_it_breaks

    @property
    def model(self) -> str:
        return "parrot"

    @property
    def variants(self) -> Sequence[str]:
        return ("good", "bad")

    @property
    def settings(self) -> Mapping[str, str]:
        return {"feathers": "green"}

    def counter(self, sample: str) -> TokenCount:
        return len

    def answer(
        self, variant: str, content: str, max_tokens: int, on_progress: OnProgress
    ) -> Answer:
        if self._left == 0:
            raise LongreachError("the parrot flew away")
        self._left -= 1
        self.asked.append((variant, content))
        on_progress(Progress(len(content), len(content)))
        return Answer(content if variant == "good" else "Hello?", len(content))


QUIET = Console(quiet=True)
SAME = {"model": "parrot"}


def grid(prompts: int = 2, **changes) -> Grid:
    fields = {"tasks": NEEDLES[:2], "lengths": [1500, 2000], "depths": [0.0, 1.0]}
    return Grid(**{**fields, "prompts": prompts, "long_prompts": 1, **changes})


@pytest.mark.parametrize("answers", [0, 1, 7, 31])
def test_a_broken_run_goes_on_and_asks_nothing_twice(tmp_path: Path, answers: int) -> None:
    path = tmp_path / "prompts.jsonl"
    first, second = Parrot(answers), Parrot()
    with pytest.raises(LongreachError):
        run(first, grid(), RecordFile(path, first.settings), QUIET)
    with path.open("a") as file:
        file.write('{"task": "pass-k')  # killed while it wrote
    run(second, grid(), RecordFile(path, second.settings), QUIET)
    whole = Parrot()
    run(whole, grid(), RecordFile(tmp_path / "whole.jsonl", whole.settings), QUIET)
    assert first.asked + second.asked == whole.asked
    assert len(set(whole.asked)) == 2 * 2 * 2 * 2 * 2

    def answers_of(name: str) -> list[tuple[object, ...]]:
        return [(r.key, r.answered, r.score) for r in read_records(tmp_path / name)[1]]

    assert answers_of("prompts.jsonl") == answers_of("whole.jsonl")


def test_a_grid_may_grow(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    parrot = Parrot()
    run(parrot, grid(prompts=1), RecordFile(path, parrot.settings), QUIET)
    asked = len(parrot.asked)
    run(parrot, grid(prompts=3), RecordFile(path, parrot.settings), QUIET)
    assert len(parrot.asked) == len(set(parrot.asked)) == 3 * asked


def test_other_settings_are_refused_with_both_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    RecordFile(path, {"dtype": "float32", "device": "cpu"})
    with pytest.raises(ConfigurationError, match=r"dtype was float32 and is bfloat16.*--out"):
        RecordFile(path, {"dtype": "bfloat16", "device": "cpu"})
    path.write_text("hello\n")
    with pytest.raises(ConfigurationError, match=path.name):
        RecordFile(path, {})
    with pytest.raises(ConfigurationError, match=r"none\.jsonl"):
        read_records(tmp_path / "none.jsonl")


def test_a_depth_that_a_task_cannot_have_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(InvalidRequestError, match=r"one-of-12-facts .* --depths any"):
        grid(tasks=NEEDLES)


def test_it_runs_where_only_the_engine_can(tmp_path: Path) -> None:
    """Without Ray, FastAPI or an HTTP client. (typer itself needs pydantic.)"""
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['ray', 'fastapi', 'openai', 'httpx2']))\n"
        "from longreach.lab.evaluation.cli import app\n"
        "app(['needles', '--lengths', '1K', '--prompts', '1', '--depths', '1', '--variants', "
        f"'dense', '--out', {str(tmp_path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_records(tmp_path / "prompts.jsonl")[1]) == 2


def test_long_cells_have_their_own_number_of_prompts() -> None:
    points = list(grid(lengths=[131_072, 131_073], tasks=NEEDLES[:1], depths=[None]).points())
    assert [tokens for tokens, *_ in points] == [131_072, 131_072, 131_073]


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_is_the_published_one(right, of, low, high) -> None:
    interval = wilson(right, of)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(of - right, of)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=5e-5)


def summary(tmp_path: Path, **changes) -> Summary:
    parrot = Parrot()
    file = RecordFile(tmp_path / "prompts.jsonl", parrot.settings)
    run(parrot, grid(**changes), file, QUIET)
    return Summary.of(parrot.settings, file.records)


def test_the_summary_counts_prompts_and_says_how_sure_it_is(tmp_path: Path) -> None:
    found = summary(tmp_path, prompts=3)
    found.write(tmp_path / "summary.json")
    written = json.loads((tmp_path / "summary.json").read_text())
    assert len(written["cells"]) == 2 * 2 * 2 * 2
    assert len(written["overall"]) == 2 * 2 * 2
    for cell in written["overall"]:
        assert cell["prompts"] == 6
        assert cell["right"] == (6 if cell["variant"] == "good" else 0)
        expected = wilson(cell["right"], 6)
        assert (cell["low"], cell["high"]) == pytest.approx((expected.low, expected.high), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "panels", "texts"),
    [
        ({}, {"pass-key, good", "pass-key, bad", "key-value, good", "key-value, bad"}, 16),
        ({"depths": [None]}, {"pass-key", "key-value"}, 0),
        ({"depths": [None], "tasks": RULER, "lengths": [4096], "prompts": 1}, {"good", "bad"}, 16),
    ],
    ids=["depths", "any depth", "RULER"],
)
def test_pictures_have_their_panels_and_a_number_in_every_cell(
    tmp_path: Path, monkeypatch, changes, panels, texts
) -> None:
    figures = []
    make = picture.new_figure
    monkeypatch.setattr(
        picture, "new_figure", lambda *sizes: figures.append(made := make(*sizes)) or made
    )
    picture.draw(summary(tmp_path, **changes), tmp_path / "picture.png")
    [(figure, axes)] = figures
    assert {each.get_title() for each in axes.flat} == panels
    assert sum(len(each.texts) for each in axes.flat) == texts
    assert "parrot" in figure.get_suptitle()
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_answers_may_hold_what_unicode_counts_as_a_lines_end(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    parrot = Parrot()
    file = RecordFile(path, parrot.settings)
    run(parrot, grid(prompts=1), file, QUIET)
    strange = replace(file.records[0], answered="one\u2028two\u0085three", seed=99)
    file.append(strange)
    assert read_records(path)[1][-1] == strange


@pytest.mark.parametrize("kept", [20, 200])
def test_what_a_killed_run_left_can_be_read_and_gone_on_with(tmp_path: Path, kept: int) -> None:
    """Cut within the settings, or within a record."""
    path = tmp_path / "prompts.jsonl"
    parrot = Parrot()
    run(parrot, grid(prompts=1), RecordFile(path, parrot.settings), QUIET)
    path.write_bytes(path.read_bytes()[:kept])
    if kept == 200:
        assert read_records(path)[0] == parrot.settings
    file = RecordFile(path, parrot.settings)
    run(parrot, grid(prompts=1), file, QUIET)
    assert read_records(path)[1] == file.records


def test_folders_of_several_processes_become_one(tmp_path: Path) -> None:
    for folder, first_seed in (("a", 0), ("b", 1), ("c", 3)):
        grid = Grid(NEEDLES[:1], [1000], [None], 2, 2, first_seed)
        run(Parrot(), grid, RecordFile(tmp_path / folder / "prompts.jsonl", SAME), QUIET)
    app = [sys.executable, "-m", "longreach.lab.evaluation", "report"]
    folders = [str(tmp_path / name) for name in "abc"]
    subprocess.run([*app, *folders], check=True, capture_output=True)
    _, records = read_records(tmp_path / "a" / "prompts.jsonl")
    good = [record.seed for record in records if record.variant == "good"]
    assert good == [0, 1, 2, 3, 4]
    assert len({record.key for record in records}) == len(records)


def test_results_under_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    grid = Grid(NEEDLES[:1], [1000], [None], 1, 1, 0)
    paths = [tmp_path / name / "prompts.jsonl" for name in "ab"]
    for path, settings in zip(paths, (SAME, {"model": "other"}), strict=True):
        run(Parrot(), grid, RecordFile(path, settings), QUIET)
    before = paths[0].read_bytes()
    with pytest.raises(ConfigurationError):
        add_records(*paths)
    assert paths[0].read_bytes() == before
