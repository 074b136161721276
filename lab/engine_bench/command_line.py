"""Which options there are, and which commands use each. What stands behind one is checked later."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

from ...engine.errors import ConfigurationError
from ...engine.model.config import WeightFormat
from ...engine.model.files import POCKET
from .sizes import count
from .subject import KV_CACHE_TYPES

COMMANDS = ("prompts", "mesh", "span", "scaling")
"""The first is meant where none is named."""
_BATCHES = "1x2K,1x128K,1x1000000,8x128K,1x1000000+30x1K"


@dataclass(frozen=True)
class _Option:
    """One that `commands` use; `form` is what argparse is told of it."""

    name: str
    commands: tuple[str, ...]
    default: object
    form: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, commands: str, default: object = None, **form: Any) -> Self:
        """With commands as they are written: "mesh span"."""
        return cls(name, tuple(commands.split()), default, form)

    @property
    def field(self) -> str:
        """What argparse calls its value."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def users(self) -> str:
        """The commands, as they stand in a sentence."""
        return ", ".join(f"`{command}`" for command in self.commands)


_EVERY = " ".join(COMMANDS)
_OPTIONS = (
    _Option.of("--csv", _EVERY, type=Path, help="to add to; else one in docs/bench"),
    _Option.of("--commit", _EVERY, help="what to call the code, where there is no git"),
    _Option.of("--seed", _EVERY, 0, type=int),
    _Option.of(
        "--tokens", "prompts mesh scaling", "1000000",
        help='a length, of prompts several, such as 32K,1000000, or "" for none',
    ),
    _Option.of(
        "--attention", "prompts mesh scaling", "sparse",
        help="sparse or dense, of prompts also sparse,dense",
    ),
    _Option.of(
        "--chunk-tokens", "prompts mesh scaling", "32K", help="of mesh several, such as 32K,64K"
    ),
    _Option.of("--kv-cache", "prompts mesh span", "bf16", choices=list(KV_CACHE_TYPES)),
    _Option.of("--weights", "prompts mesh span", "auto", choices=get_args(WeightFormat)),
    _Option.of(
        "--meshes", "mesh span scaling", help="tensor x sequence parallel, such as 1x1,2x4"
    ),
    _Option.of("--decode", "prompts span", 64, type=int, help="tokens after the first"),
    _Option.of(
        "--batches", "prompts span", _BATCHES, help='decode only; of prompts also "" for none'
    ),
    _Option.of(
        "--tokenizer", "prompts span",
        help="of a shape: a folder with the model's own, for what grammars cost",
    ),
    _Option.of("--dense-up-to", "prompts", type=count, help="leave longer dense prompts out"),
    _Option.of(
        "--sampled", "prompts", False, action="store_true", help="batches with top-p 0.8 as well"
    ),
    _Option.of(
        "--held", "prompts", False, action="store_true",
        help="and batches that are held to a grammar besides",
    ),
    _Option.of(
        "--baseline", "prompts", False, action="store_true", help="time cuDNN's attention as well"
    ),
    _Option.of("--rank-tokens", "mesh", help="besides, chunks of so many for each sequence rank"),
    _Option.of("--link-gbs", "scaling", 450.0, type=float, help="GB/s each way"),
    _Option.of("--latency-us", "scaling", 20.0, type=float, help="of a collective"),
)  # fmt: skip


def read(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What is given, and the defaults of all that is not, whichever command uses them.

    Raises:
        ConfigurationError: an option is given that the command does not use.
    """
    given = vars(_parser().parse_args(arguments))
    _refuse_unused(given)
    defaults = {option.field: option.default for option in _OPTIONS}
    return argparse.Namespace(**{**defaults, **given})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longreach.lab.engine_bench",
        description="Prefill and decode at a model's real size on this machine's device; "
        "`mesh` runs meshes of several GPUs, `span` decodes on several, and `scaling` predicts "
        "meshes from one rank's work.",
    )
    parser.add_argument("what", nargs="?", choices=COMMANDS, default=COMMANDS[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shape", default="qwen2.5-7b-1m", help="random weights of this shape")
    which.add_argument("--checkpoint", help=f"a checkpoint folder, or {POCKET}")
    for commands in dict.fromkeys(option.commands for option in _OPTIONS):
        group = parser.add_argument_group(f"options of {', '.join(commands)}")
        for option in _OPTIONS:
            if option.commands == commands:
                # Without a default what was given can be told from what was not.
                group.add_argument(option.name, default=argparse.SUPPRESS, **option.form)
    return parser


def _refuse_unused(given: Mapping[str, object]) -> None:
    """An option that changes nothing would have somebody read figures as what they are not."""
    unused = [
        f"{option.name} (for {option.users})"
        for option in _OPTIONS
        if option.field in given and given["what"] not in option.commands
    ]
    if unused:
        raise ConfigurationError(
            f"`{given['what']}` does not use {', '.join(unused)}; leave that out, or name a "
            "command that uses it"
        )
