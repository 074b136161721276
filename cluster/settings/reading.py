"""From a YAML file to checked settings."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from ...engine.errors import ConfigurationError
from .problems import problems
from .whole import Whole


class Settings(Whole):
    """A whole cluster that can run."""

    @model_validator(mode="after")
    def _can_run(self) -> "Settings":
        problem = next(problems(self), None)
        if problem is not None:
            raise ValueError(problem)
        return self


def read_settings(path: Path) -> Settings:
    """Read and check a configuration; the checkpoint may lie elsewhere, and is not looked at.

    Raises:
        ConfigurationError: the file is missing, is not YAML, or describes what cannot run.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}); name a cluster's YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text: {error}") from error
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ConfigurationError(f"{path} is not valid YAML: {said}") from error
    return parse_settings(raw, str(path))


def parse_settings(raw: Any, source: str = "configuration") -> Settings:
    """Check what a YAML file said.

    Raises:
        ConfigurationError: with the first thing that is wrong.
    """
    if not isinstance(raw, dict):
        raise ConfigurationError(f"{source} is empty or not a mapping; begin with `model:`")
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        # The one form has no list, and so no place in it.
        one_gang = not isinstance(raw.get("prefill"), list)
        raise ConfigurationError(f"{source}: {_first_problem(error, one_gang)}") from error


def _first_problem(error: ValidationError, one_gang: bool) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    if one_gang:
        where = where.replace("prefill.0", "prefill", 1)
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key '{where}'; remove it or correct its spelling"
        case "missing":
            return f"'{where}' is missing; add it"
        case "value_error":
            return problem["msg"].removeprefix("Value error, ")
    return f"{where}: {problem['msg']}, not {problem['input']!r}"
