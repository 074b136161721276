"""Processes of a test, forked from one that has imported what they need.

Each would otherwise import torch again, which takes seconds of a core. Where there is a GPU they
do: whoever has asked CUDA for anything cannot be forked.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import start_processes

_IMPORTED = [
    "pytest",
    "torch",
    "longreach.cluster.transports.nixl",
    "longreach.cluster.transports.shared_pages",
    "longreach.engine.decode.decoder",
    "longreach.engine.decode.follower",
    "longreach.engine.decode.leader",
    "longreach.engine.local",
    "longreach.engine.parallel.mesh",
    "longreach.lab.pocket.tokenizer",
]


def forking() -> Any:
    """The context of `multiprocessing` whose processes have torch at once.

    They have the environment of the first one's start: what a later one needs, it sets itself.
    """
    context: Any = multiprocessing.get_context(_start_method())
    context.set_forkserver_preload(_IMPORTED)
    return context


def _start_method() -> str:
    return "spawn" if torch.cuda.is_available() else "forkserver"


def run_ranks(main: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """Call `main(rank, *arguments)` in so many processes, and wait for all of them.

    Raises:
        ProcessRaisedException: of the first one that failed; the others are ended.
    """
    forking()
    start_processes(main, args=arguments, nprocs=ranks, start_method=_start_method())
