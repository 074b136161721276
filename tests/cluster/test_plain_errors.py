"""Whatever an actor raises, whoever reads it loads nothing for it."""

import ast
import asyncio
import importlib
import inspect
import tarfile
from collections.abc import AsyncGenerator, Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from ray.cloudpickle import cloudpickle
from ray.exceptions import ActorDiedError, RayTaskError
from torch.distributed import DistBackendError

from longreach.cluster.decode.follower import DecodeFollower
from longreach.cluster.decode.worker import DecodeWorker
from longreach.cluster.plain_errors import passes_on_plain_errors
from longreach.cluster.prefill.rank import PrefillRank
from longreach.engine.errors import (
    ChunkOutOfMemoryError,
    DoesNotFitError,
    FactualError,
    LeftMeshError,
    LostError,
    MemoryNeeds,
    RefusedPagesError,
    TransferError,
)

from ..house.test_imports import loaded

ROOT = Path(__file__).parents[2]
ROOMS = ("engine", "kernels", "cluster", "deploy", "plugins", "lab", "loadtest")
ACTORS = (PrefillRank, DecodeWorker, DecodeFollower)


class UnreadableError(Exception):
    """Cannot be sent."""

    def __init__(self) -> None:
        super().__init__(each for each in ())


def from_another_process(cause: Exception) -> Exception:
    return RayTaskError("deliver", "Traceback ...", cause, "a", 1, "b").as_instanceof_cause()


PLAIN = [
    ChunkOutOfMemoryError(0, 1024),
    DoesNotFitError(MemoryNeeds("prefill", 1, 2, 3, 4, 5, 6, False), 7).with_remedy("less"),
    LeftMeshError(),
    LostError("a rank is lost", begun=False),
    RefusedPagesError("a", "layer 0", TransferError("they do not fit")),
    ValueError("a name"),
    FileNotFoundError(2, "no such file", "model.safetensors"),
    ActorDiedError(),
    from_another_process(TransferError("they do not fit")),
]
HEAVY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    DistBackendError("NCCL error"),
    KeyError(torch.float8_e4m3fn),
    TransferError(torch.zeros(1)),
    from_another_process(DistBackendError("NCCL error")),
    UnreadableError(),
    # Its constructor does not take what it keeps.
    tarfile.OutsideDestinationError(tarfile.TarInfo("a"), "b"),
]


@passes_on_plain_errors
class Actor:
    """Raises what it is given, in each way that there is."""

    def __init__(self, error: Exception | None = None) -> None:
        if error is not None:
            raise error

    def call(self, error: Exception) -> None:
        raise error

    async def wait(self, error: Exception) -> None:
        raise error

    async def generate(self, error: Exception) -> AsyncGenerator[int, None]:
        yield 1
        raise error

    async def count(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(10):
                yield number
        finally:
            self.closed = True

    def add(self, a: int, b: int = 1) -> int:
        return a + b


async def generated(values: AsyncGenerator[int, None]) -> list[int]:
    return [value async for value in values]


WAYS: dict[str, Callable[[Exception], Any]] = {
    "constructor": Actor,
    "call": lambda error: Actor().call(error),
    "wait": lambda error: asyncio.run(Actor().wait(error)),
    "generate": lambda error: asyncio.run(generated(Actor().generate(error))),
}


def raised(way: str, error: Exception) -> Exception:
    try:
        WAYS[way](error)
    except Exception as passed_on:
        return passed_on
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("way", WAYS)
def test_plain_errors_are_passed_on_as_they_are(way: str) -> None:
    for error in PLAIN:
        assert raised(way, error) is error


def classes() -> dict[str, tuple[str, set[str]]]:
    """Of each class of the source: the module that it stands in, and its bases' names."""
    found = {}
    for path in (each for room in ROOMS for each in (ROOT / room).rglob("*.py")):
        module = ".".join(("longreach", *path.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                found[node.name] = (module, bases)
    return found


def errors_of_ours() -> dict[str, str]:
    """Every LongreachError there is, and the module that it stands in."""
    every, ours = classes(), {"LongreachError"}
    while more := {name for name, (_, bases) in every.items() if bases & ours} - ours:
        ours |= more
    return {name: every[name][0] for name in ours}


def test_every_error_of_ours_is_passed_on_as_it_is_but_the_command_lines() -> None:
    """No process that has torch raises these, or has their modules."""
    ours = errors_of_ours()
    assert len(ours) > 40
    elsewhere = {name: module for name, module in ours.items() if not module.endswith(".errors")}
    assert elsewhere.keys() == {"ClusterLostError", "EndpointError", "PortInUseError"}
    for name in ours.keys() - elsewhere.keys():
        kind: Any = getattr(importlib.import_module(ours[name]), name)
        if issubclass(kind, FactualError) and not is_dataclass(kind):
            continue  # It names no facts: it is what others have in common.
        facts = [1 for _ in fields(kind)] if is_dataclass(kind) else ["in words"]
        error = cast(Any, kind)(*facts)
        assert raised("call", error) is error
    actors = ", ".join(each.__module__ for each in ACTORS)
    assert loaded(f"import {actors}", set(elsewhere.values())) == set()


def test_whoever_reads_a_plugins_error_loads_no_plugin() -> None:
    plugins = {module for module in errors_of_ours().values() if ".plugins." in module}
    assert plugins
    heavy = {"torch", "vllm", "ray"}
    assert loaded(f"import {', '.join(sorted(plugins))}", heavy) == set()


@pytest.mark.parametrize("way", WAYS)
def test_others_are_passed_on_in_words(way: str) -> None:
    for error in HEAVY:
        passed_on = raised(way, error)
        assert type(passed_on) is RuntimeError
        assert passed_on.__cause__ is error
        assert type(error).__name__ in str(passed_on)
    assert "NCCL error" in str(raised(way, DistBackendError("NCCL error")))


def test_whoever_reads_them_loads_no_torch() -> None:
    sent = [cloudpickle.dumps(raised("call", error)) for error in [*PLAIN, *HEAVY]]
    program = f"import pickle\nfor each in {sent!r}:\n    pickle.loads(each)"
    assert loaded(program, {"torch", "ray"}) == {"ray"}


def test_what_they_return_and_how_they_end_is_as_it_was() -> None:
    actor = Actor()
    assert actor.add(1) == 2
    assert actor.add(a=1, b=3) == 4
    assert asyncio.run(generated(actor.count())) == list(range(10))

    async def left_early() -> int:
        counting = Actor.count(actor)
        first = await anext(counting)
        actor.closed = False
        await counting.aclose()
        return first

    assert asyncio.run(left_early()) == 0
    assert actor.closed
    assert list(inspect.signature(Actor.add).parameters) == ["self", "a", "b"]


@pytest.mark.parametrize("actor", ACTORS)
def test_all_that_have_torch_pass_on_plain_errors(actor: type) -> None:
    methods = {
        name: member
        for name, member in vars(actor).items()
        if inspect.isfunction(member) and (name == "__init__" or not name.startswith("_"))
    }
    assert methods
    assert {name for name, member in methods.items() if not hasattr(member, "__wrapped__")} == set()
