"""The command line of the engine's benchmark: what each command takes, and what it refuses."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from longreach.engine.errors import CheckpointError, ConfigurationError
from longreach.lab.engine_bench.options import parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CALL = re.compile(r"python -m longreach\.lab\.engine_bench([^`\n]*)")

VALUES = {
    "--tokens": ["32K"], "--attention": ["dense"], "--dense-up-to": ["32K"],
    "--kv-cache": ["bf16"], "--weights": ["fp8"], "--chunk-tokens": ["64K"],
    "--rank-tokens": ["16K"], "--decode": ["8"], "--batches": ["1x2K"], "--sampled": [],
    "--held": [], "--tokenizer": ["folder"], "--baseline": [], "--csv": ["a.csv"],
    "--commit": ["abc"], "--seed": ["1"], "--meshes": ["2x1"], "--link-gbs": ["50"],
    "--latency-us": ["10"],
}  # fmt: skip
"""Of every option a value; those of pages are the default, which is no less ignored than others."""
OF_ALL = {"--csv", "--commit", "--seed"}
OF_A_PROMPT = {"--tokens", "--attention", "--chunk-tokens"}
OF_BATCHES = {"--decode", "--batches", "--tokenizer"}
KEPT = {"--kv-cache", "--weights"}
USED = {
    "prompts": OF_ALL | OF_A_PROMPT | OF_BATCHES | KEPT
    | {"--dense-up-to", "--sampled", "--held", "--baseline"},
    "mesh": OF_ALL | OF_A_PROMPT | KEPT | {"--meshes", "--rank-tokens"},
    "span": OF_ALL | OF_BATCHES | KEPT | {"--meshes"},
    "scaling": OF_ALL | OF_A_PROMPT | {"--meshes", "--link-gbs", "--latency-us"},
}  # fmt: skip


def calls(page: Path) -> Iterator[str]:
    """The arguments of every call on a page, without what a line says about it."""
    for call in CALL.findall(page.read_text(encoding="utf-8").replace("\\\n", " ")):
        yield call.partition(" #")[0].strip()


DOCUMENTED = sorted({call for page in PAGES for call in calls(page)})


@pytest.mark.parametrize("call", DOCUMENTED)
def test_every_call_in_the_docs_is_taken(call: str) -> None:
    assert parse(shlex.split(call)).what in USED


def test_calls_of_every_command_are_found_in_the_docs() -> None:
    assert {parse(shlex.split(call)).what for call in DOCUMENTED} == set(USED)


@pytest.mark.parametrize("option", VALUES)
@pytest.mark.parametrize("command", USED)
def test_an_option_that_a_command_does_not_use_is_refused(command: str, option: str) -> None:
    arguments = [command, option, *VALUES[option]]
    if option in USED[command]:
        assert parse(arguments).what == command
        return
    with pytest.raises(ConfigurationError, match=f"`{command}` does not use {option} ") as refused:
        parse(arguments)
    # As a command that does use it is the remedy.
    users = ", ".join(f"`{each}`" for each in USED if option in USED[each])
    assert f"{option} (for {users})" in str(refused.value)


def test_where_no_command_is_named_prompts_are_meant() -> None:
    assert parse(["--seed", "3"]) == parse(["prompts", "--seed", "3"]) == parse(["--seed=3"])
    with pytest.raises(ConfigurationError, match="`prompts` does not use --meshes"):
        parse(["--meshes", "1x2"])


def test_all_that_is_not_used_is_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse(["mesh", "--baseline", "--batches", "1x2K", "--decode", "8", "--sampled"])
    for option in ("--baseline", "--batches", "--decode", "--sampled"):
        assert option in str(refused.value)


@pytest.mark.parametrize("command", ["mesh", "scaling"])
@pytest.mark.parametrize(
    ("option", "value"), [("--tokens", "128K,1000000"), ("--attention", "sparse,dense")]
)
def test_what_measures_one_takes_one(command: str, option: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{option} {value}: {command} measures one"):
        parse([command, option, value])
    assert parse([option, value]).what == "prompts"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "1G"], "'1G'"),
        (["--tokens", "32K,0"], "'0'"),
        (["--attention", "full"], "--attention full"),
        (["--batches", "8*1K"], r"'8\*1K'"),
        (["--batches", "0x1K"], "'0x1K'"),
        (["--chunk-tokens", "1000"], "--chunk-tokens is 1000"),
        (["--decode", "-1"], "--decode"),
        (["scaling", "--tokens", ""], "--tokens"),
        (["mesh", "--tokens", ""], "--tokens"),
        (["span", "--batches", ""], "--batches"),
        (["span", "--decode", "1"], "--decode"),
        (["--tokens", "", "--batches", ""], "--tokens"),
        (["--tokens", ",", "--batches", ","], "--tokens"),
        (["mesh", "--meshes", ""], "''"),
        (["mesh", "--rank-tokens", "100"], "--rank-tokens is 100"),
        (["mesh", "--rank-tokens", ""], "''"),
        (["scaling", "--chunk-tokens", "32K,64K"], "`mesh`"),
        (["scaling", "--meshes", "8"], "'8'"),
        (["scaling", "--link-gbs", "0"], "--link-gbs"),
        (["scaling", "--latency-us", "-1"], "--latency-us"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        parse(arguments)


def test_lengths_and_batches_are_read() -> None:
    options = parse(["--tokens", "128K, 1m,32K,32768", "--batches", "2x1K+1x3"])
    assert options.tokens == (32_768, 131_072, 2**20)
    assert options.batches == ((1024, 1024, 3),)
    assert options.files.random
    with pytest.raises(CheckpointError, match=r"qwen2\.5-7b-1m"):
        parse(["--shape", "qwen3"])
