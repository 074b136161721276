"""The command line, without a cluster."""

import signal
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longreach.cluster import app as cluster_app
from longreach.cluster.cli import main as cli
from longreach.cluster.settings import Settings
from longreach.engine.errors import UnavailableError
from longreach.engine.model.pocket import CHECKPOINT

LAPTOP = Path(__file__).parents[3] / "configs" / "laptop.yaml"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "160"})
    return result.exit_code, result.output


def main_error(monkeypatch: pytest.MonkeyPatch, capsys, *arguments: str) -> str:
    """What `longreach ARGUMENTS` says on standard error, having failed."""
    monkeypatch.setattr(sys, "argv", ["longreach", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "demo", "ask", "config"])
def test_help_teaches_with_an_example(command: str) -> None:
    status, output = run(command, "--help")
    assert status == 0
    assert f"longreach {command} " in output


def test_config_says_what_would_run() -> None:
    status, output = run("config", str(LAPTOP))
    assert status == 0, output
    for words in ("ingress", "prefill rank", "decode worker", "tensor 1 × sequence 2", "GiB"):
        assert words in output


def test_config_shows_every_gang() -> None:
    status, output = run("config", str(LAPTOP.with_name("laptop-two-gangs.yaml")))
    assert status == 0, output
    said = " ".join(output.replace("│", " ").split())
    for words in ("short, prompts up to 8,192", "long, prompts up to 1,056,768"):
        assert words in said


def test_serve_and_demo_warn_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for path in CHECKPOINT.glob("*.json"):
        if path.name != "sparse_attention_config.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    wrong = tmp_path / "dense.yaml"
    wrong.write_text(LAPTOP.read_text().replace("path: pocket", f"path: {tmp_path}"))

    def refused(settings: Settings) -> None:
        raise UnavailableError("not in this test")

    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(cluster_app, "start", refused)
    for command in ("serve", "demo"):
        status, output = run(command, str(wrong))
        assert status == 1
        assert "warning: prefill.sparse" in output
    assert "warning" not in run("serve", str(LAPTOP))[1]


def test_a_missing_config_is_one_line(monkeypatch, capsys, tmp_path: Path) -> None:
    error = main_error(monkeypatch, capsys, "config", str(tmp_path / "none.yaml"))
    assert error.startswith("longreach: ")
    assert "none.yaml" in error
    assert error.count("\n") == 1


def test_an_unknown_key_is_named(monkeypatch, capsys, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(LAPTOP.read_text() + "\nprefil: {}\n")
    error = main_error(monkeypatch, capsys, "config", str(wrong))
    assert "prefil" in error
    assert "Traceback" not in error


def test_ask_without_an_endpoint_says_how_to_start_one(monkeypatch, capsys, tmp_path) -> None:
    document = tmp_path / "book.txt"
    document.write_text("Call me Ishmael.")
    error = main_error(
        monkeypatch, capsys, "ask", "--file", str(document), "--base-url", "http://127.0.0.1:9", "?"
    )
    assert "longreach serve" in error


def test_ask_refuses_what_is_not_text(monkeypatch, capsys, tmp_path: Path) -> None:
    document = tmp_path / "book.bin"
    document.write_bytes(b"\xff\xfe\x00")
    assert "book.bin" in main_error(monkeypatch, capsys, "ask", "--file", str(document), "?")
