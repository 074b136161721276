"""The options that several commands share: how they are written, and what they mean.

typer reads a command's options off its signature, so each command names those that it has; what
one is (type, bounds, help) is said here, once. torch is imported only where it is needed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from ...engine.errors import InvalidRequestError
from ...engine.model.config import WeightFormat
from ..lengths import parse_length

if TYPE_CHECKING:
    import torch

    from .in_process import Variant
    from .tasks import Task

Checkpoint = Annotated[
    Path, typer.Option(exists=True, file_okay=False, help="A checkpoint folder; else the pocket's.")
]
Lengths = Annotated[str, typer.Option(help="Prompt tokens, as 2K,32K,1M or plain numbers.")]
Variants = Annotated[
    str,
    typer.Option(
        help="Which of dense,no-temperature,plain,sparse,fp8,fp8-weights,fp8-both; not for an "
        "endpoint."
    ),
]
Prompts = Annotated[int, typer.Option(min=1, help="Prompts in a cell.")]
LongPrompts = Annotated[
    int | None, typer.Option(min=1, help="Prompts in a cell above 131,072 tokens; else as many.")
]
FirstSeed = Annotated[int, typer.Option(min=0, help="Prompts have this seed and those after it.")]
Device = Annotated[
    str | None, typer.Option(help="Where to compute: cuda or cpu; else cuda if there is one.")
]
DtypeName = Annotated[
    str | None, typer.Option(help="bfloat16 or float32; else the first on cuda, the last on cpu.")
]
Kept = Annotated[
    str, typer.Option(help="fp8 rounds linear layers' weights to 8 bits; auto leaves them.")
]
Out = Annotated[Path, typer.Option(file_okay=False, help="The folder for results.")]

Length = Annotated[str, typer.Option(help="Tokens of each text, as 64K.")]
Text = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="UTF-8 text; else made up.")
]
LastQueries = Annotated[
    int | None,
    typer.Option(min=1, max=64, help="Queries that select; else the checkpoint's number."),
]


def lengths_of(text: str) -> list[int]:
    """Different lengths, ascending, from "2K,32K,1M"."""
    return sorted({_length(each, "--lengths") for each in text.split(",")})


def length_of(text: str) -> int:
    """One length, from "64K"."""
    return _length(text, "--length")


def depths_of(text: str) -> list[float | None]:
    """Different depths, ascending, from "0,0.5,1"; one of None, anywhere, from "any"."""
    if text == "any":
        return [None]
    try:
        depths = {float(each) for each in text.split(",")}
    except ValueError as error:
        raise InvalidRequestError(f"--depths {text} are not numbers, as 0,0.5,1 are") from error
    if not all(0 <= depth <= 1 for depth in depths):
        raise InvalidRequestError(f"--depths {text} must lie between 0 (start) and 1 (end)")
    return [*sorted(depths)]


def budget_of(text: str) -> tuple[int, int]:
    """Verticals and slashes, from "64,128"."""
    try:
        verticals, slashes = map(int, text.split(","))
    except ValueError as error:
        raise InvalidRequestError(f"{text} is no pair of numbers, as 64,128 is") from error
    if min(verticals, slashes) < 1:
        raise InvalidRequestError(f"{text} must be one vertical and one slash or more, as 64,128")
    return verticals, slashes


def tasks_of(text: str, tasks: "Sequence[Task]") -> "tuple[Task, ...]":
    """Those of `tasks` that are named, each once, in the order of their names."""
    by_name = {task.name: task for task in tasks}
    names = dict.fromkeys(text.split(","))
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise InvalidRequestError(f"no task is called {unknown[0]}; there are {', '.join(by_name)}")
    return tuple(by_name[name] for name in names)


def variants_of(text: str) -> "list[Variant]":
    """The variants that are named, each once."""
    from .in_process import Variant

    names = dict.fromkeys(text.split(","))
    unknown = [name for name in names if name not in [*Variant]]
    if unknown:
        raise InvalidRequestError(
            f"no variant is called {unknown[0]}; there are {', '.join(Variant)}"
        )
    return [Variant(name) for name in names]


def kept_as(weights: str) -> WeightFormat:
    """How weights are kept."""
    if weights not in get_args(WeightFormat):
        raise InvalidRequestError(f"--weights {weights} is unknown; take auto or fp8")
    return cast(WeightFormat, weights)


def place_of(device: str | None, dtype: str | None) -> "tuple[torch.dtype, torch.device]":
    """Float type and device. On CPUs it is float32: a model is evaluated there, not a type."""
    import torch

    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InvalidRequestError(f"--device {device} is unknown; take cuda or cpu") from error
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    name = dtype or ("bfloat16" if chosen.type == "cuda" else "float32")
    if name not in dtypes:
        raise InvalidRequestError(f"--dtype {name} is not served; take bfloat16 or float32")
    return dtypes[name], chosen


def _length(text: str, option: str) -> int:
    try:
        return parse_length(text)
    except ValueError as error:
        raise InvalidRequestError(f"{option}: {error}") from error
