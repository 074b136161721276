"""Single prompts with their answers, a line of JSON each, so that an interrupted run goes on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...engine.errors import ConfigurationError

_FORMAT = 1

Key = tuple[str, str, int, float | None, int]


@dataclass(frozen=True)
class Record:
    """One prompt and what came back.

    `tokens` is the length asked for, `prompt_tokens` what the model counted; `depth` None is
    anywhere; `score` is 0 to 1, `seconds` from asking to the whole answer.
    """

    task: str
    variant: str
    tokens: int
    depth: float | None
    seed: int
    prompt_tokens: int
    expected: tuple[str, ...]
    answered: str
    score: float
    seconds: float
    model: str
    versions: Mapping[str, str]

    @property
    def key(self) -> Key:
        """What makes it one prompt; none is asked twice."""
        return self.task, self.variant, self.tokens, self.depth, self.seed


class RecordFile:
    """Records that grow, under settings that do not change.

    The first line holds the settings. A last line that was cut off when a run was killed is
    dropped; its prompt is asked again.

    Raises:
        ConfigurationError: the file holds records of other settings, or is something else.
    """

    def __init__(self, path: Path, settings: Mapping[str, str]) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[Record] = []
        if path.exists():
            _drop_cut_line(path)
        if path.exists() and path.stat().st_size:
            found, self.records = read_records(path)
            _check_same(path, found, settings)
        else:
            self._write({"format": _FORMAT, "settings": dict(settings)})

    def append(self, record: Record) -> None:
        """Add a record; it is on its way to the disk when this returns."""
        self._write(asdict(record))
        self.records.append(record)

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_records(path: Path) -> tuple[dict[str, str], list[Record]]:
    """Settings and records of a file; a last line that was cut off is left out.

    Raises:
        ConfigurationError: it is missing, or no such file.
    """
    try:
        # Not splitlines(): an answer may hold what Unicode counts as a line's end.
        first, *lines = path.read_bytes().split(b"\n")[:-1]
        head = json.loads(first)
        if head["format"] != _FORMAT:
            raise ConfigurationError(f"{path} has format {head['format']}, not {_FORMAT}")
        records = [Record(**json.loads(line)) for line in lines]
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} holds no evaluation results ({error}); name another folder with --out"
        ) from error
    return head["settings"], [_with_tuple(record) for record in records]


def add_records(path: Path, source: Path) -> None:
    """Add the records of another file, except prompts that are there already.

    Raises:
        ConfigurationError: one of them is missing or no such file, or their settings differ.
    """
    settings, records = read_records(source)
    read_records(path)
    file = RecordFile(path, settings)
    known = {record.key for record in file.records}
    for record in records:
        if record.key not in known:
            file.append(record)


def _with_tuple(record: Record) -> Record:
    return Record(**{**record.__dict__, "expected": tuple(record.expected)})


def _drop_cut_line(path: Path) -> None:
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _check_same(path: Path, found: Mapping[str, str], settings: Mapping[str, str]) -> None:
    different = [
        f"{name} was {found.get(name, 'not set')} and is {settings.get(name, 'not set')}"
        for name in sorted({*found, *settings})
        if found.get(name) != settings.get(name)
    ]
    if different:
        raise ConfigurationError(
            f"{path} holds answers under other settings ({'; '.join(different)}); "
            "name another folder with --out, or use those settings"
        )


def cells_of(records: Sequence[Record]) -> dict[tuple[str, str, int, float | None], list[Record]]:
    """Records by task, variant, length and depth, in the order in which these first occur."""
    cells: dict[tuple[str, str, int, float | None], list[Record]] = {}
    for record in records:
        cells.setdefault(record.key[:4], []).append(record)
    return cells
