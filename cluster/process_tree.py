"""All processes of one Ray session, whoever their parent has become.

Ray's workers are children of the raylet. When that is killed, the kernel gives them a new parent,
and nothing in their title, their environment or their process group says whose they were: Ray
writes the title over the environment. Two things still do. The process that started Ray adopts
orphans, so they stay below it; and each of them has its log in the session's folder open.
"""

import ctypes
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.05
_KILL_SECONDS = 10


def adopt_orphans() -> None:
    """Make this process the new parent of what its descendants leave behind, in place of init.

    Raises:
        OSError: the kernel refused.
    """
    if sys.platform != "linux":
        raise OSError(f"a cluster is kept together by means of Linux, and this is {sys.platform}")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def session_processes(session: Path) -> list[psutil.Process]:
    """Descendants of this process that have a file of the session open, and all below these."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.Process().children(recursive=True):
        if process.pid not in found and _has_open(process.pid, session):
            found[process.pid] = process
            found.update((below.pid, below) for below in _children(process))
    return list(found.values())


def kill_session(session: Path, seconds: float = _KILL_SECONDS) -> list[int]:
    """Kill every process of the session, and those that these start meanwhile.

    Returns:
        The ids of processes that are still there after so many seconds: in an uninterruptible
        call of the kernel, for which nobody can do anything.
    """
    deadline = time.monotonic() + seconds
    killed: set[int] = set()
    while (left := session_processes(session)) and time.monotonic() < deadline:
        for process in left:
            _kill(process)
        killed.update(process.pid for process in left)
        time.sleep(_POLL_SECONDS)
    _collect(killed - {process.pid for process in left})
    return [process.pid for process in left]


def collect_orphans(title: str) -> None:
    """Take the exit status of children whose title began so, or they stay as zombies.

    Of what a raylet started, nobody else does it once the raylet is dead.
    """
    children = psutil.Process().children()
    _collect(child.pid for child in children if _is_zombie(child, title))


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _has_open(pid: int, folder: Path) -> bool:
    prefix = f"{folder}/"
    return any(target.startswith(prefix) for target in _open_files(pid))


def _open_files(pid: int) -> Iterator[str]:
    """Paths behind the descriptors of a process; of one that ended or is a zombie, none."""
    try:
        with os.scandir(f"/proc/{pid}/fd") as descriptors:
            names = [descriptor.path for descriptor in descriptors]
    except OSError:
        return
    for name in names:
        try:
            yield os.readlink(name)
        except OSError:
            continue


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _is_zombie(process: psutil.Process, title: str) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE and process.name().startswith(title)
    except psutil.NoSuchProcess:
        return False


def _collect(ended: Iterable[int]) -> None:
    """Take the exit status of those that are children of ours by now."""
    for pid in ended:
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            continue
