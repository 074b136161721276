"""A process that takes much to begin with, and with each job as much as that asks for."""

import os

from longreach.cluster.rest import child

MOST_GROWTH = 32 << 20


def serve() -> None:
    """Do jobs from standard input; it goes by itself when it has grown by more than that."""
    child.serve(_begin, MOST_GROWTH)


def _begin(size: int) -> child.Work:
    held = [_resident(size)]

    def grow(size: int) -> int:
        held.append(_resident(size))
        return os.getpid()

    return grow


def _resident(size: int) -> bytes:
    return b"a" * size  # zeros would be no memory yet
