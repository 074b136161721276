"""One file of figures, and the lock by which readers know whether its writer lives."""

import fcntl
from pathlib import Path
from typing import IO

from prometheus_client.mmap_dict import MmapedDict


class Sheet:
    """One file of one writer. Whoever may lock it knows that its writer is gone.

    The kernel drops the lock however a process ends, so nobody has to notice deaths, and a
    process id that is used again confuses nobody.
    """

    def __init__(self, path: Path) -> None:
        # Readers must never meet a file that is empty yet or not locked yet.
        unfinished = path.with_suffix(".new")
        self._values = MmapedDict(str(unfinished))
        self._held = lock(unfinished, fcntl.LOCK_EX)
        unfinished.rename(path)

    def add(self, key: str, amount: float) -> None:
        value, _ = self._values.read_value(key)
        self._values.write_value(key, value + amount, 0.0)

    def set(self, key: str, value: float) -> None:
        self._values.write_value(key, value, 0.0)

    def close(self) -> None:
        self._values.close()
        if self._held is not None:
            self._held.close()


def lock(path: Path, kind: int) -> IO[bytes] | None:
    """Lock a file until the returned handle is closed, or None when another holds it."""
    handle = path.open("rb")
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle
