"""The processes of a cluster, found below `longreach serve` by the titles that Ray gives them."""

import glob
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

_POLL_SECONDS = 0.1


class Kind(StrEnum):
    """What a cluster consists of, by the names that scenarios use."""

    RANK = "rank"
    PREFILL_REPLICA = "prefill-replica"
    DECODE_WORKER = "decode-worker"
    DECODE_REPLICA = "decode-replica"
    INGRESS = "ingress"
    PROXY = "proxy"
    CONTROLLER = "controller"
    GCS = "gcs"
    RAYLET = "raylet"


_TITLES = {
    Kind.RANK: "ray::PrefillRank",
    Kind.PREFILL_REPLICA: "ray::ServeReplica:longreach:prefill",
    Kind.DECODE_WORKER: "ray::DecodeWorker",
    Kind.DECODE_REPLICA: "ray::ServeReplica:longreach:decode",
    Kind.INGRESS: "ray::ServeReplica:longreach:ingress",
    Kind.PROXY: "ray::ProxyActor",
    Kind.CONTROLLER: "ray::ServeController",
}
_PROGRAMS = {Kind.GCS: "gcs_server", Kind.RAYLET: "raylet"}


def kind_of(name: str, command_line: list[str]) -> Kind | None:
    """Which kind a process is, by its program's name and its command line; None for others."""
    title = " ".join(command_line)
    for kind, start in _TITLES.items():
        if title.startswith(start):
            return kind
    return next((kind for kind, program in _PROGRAMS.items() if name == program), None)


@dataclass(frozen=True)
class Remains:
    """What a cluster left behind: titles of processes, and folders."""

    processes: list[str]
    folders: list[str]

    def __bool__(self) -> bool:
        return bool(self.processes or self.folders)


class ProcessTree:
    """`longreach serve` and all below it."""

    def __init__(self, pid: int) -> None:
        self.serve = psutil.Process(pid)

    def of(self, kind: Kind) -> list[psutil.Process]:
        """Living processes of a kind, the oldest first."""
        found = [each for each in self._all() if _kind(each) == kind]
        return sorted(found, key=lambda process: process.create_time())

    def wait_for(self, kind: Kind, seconds: float) -> list[psutil.Process]:
        """As `of`, once there is one.

        Raises:
            LookupError: there is none after so many seconds.
        """
        deadline = time.monotonic() + seconds
        while not (found := self.of(kind)):
            if time.monotonic() > deadline:
                raise LookupError(f"no process of kind {kind} below {self.serve.pid}")
            time.sleep(_POLL_SECONDS)
        return found

    def watch_what_remains(self) -> "Belongings":
        """Remember everything that must be gone once the cluster has ended."""
        everything = self._all()
        return Belongings(everything, metrics_folders(everything))

    def _all(self) -> list[psutil.Process]:
        try:
            return self.serve.children(recursive=True)
        except psutil.NoSuchProcess:
            return []


class Belongings:
    """Processes and folders of a cluster, at a moment when it was well."""

    def __init__(self, processes: list[psutil.Process], folders: set[str]) -> None:
        self._titles = {process: _title(process) for process in processes}
        self._folders = folders

    def remains(self, seconds: float) -> Remains:
        """What is still there; asked again until nothing is, for so many seconds at most."""
        deadline = time.monotonic() + seconds
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return left

    def end(self) -> None:
        """Kill what is left, so that the next scenario has the machine to itself."""
        for process in self._titles:
            if _is_there(process):
                send(process, signal.SIGKILL)

    def _left(self) -> Remains:
        processes = [title for process, title in self._titles.items() if _is_there(process)]
        return Remains(processes, [each for each in self._folders if os.path.isdir(each)])


def metrics_folders(processes: Iterable[psutil.Process]) -> set[str]:
    """Folders of figures that these processes have open."""
    pattern = str(Path(os.environ.get("TMPDIR", "/tmp")) / "longreach-metrics-*")
    folders = glob.glob(pattern)
    return {folder for each in processes for folder in folders if _has_open(each.pid, folder)}


def send(process: psutil.Process, number: signal.Signals) -> bool:
    """Send a signal; False where the process is gone already."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def reset_peak_memory(process: psutil.Process) -> None:
    """Count the peak from now on."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def peak_memory(process: psutil.Process) -> int | None:
    """Most bytes of memory that a process had at once; None where it is gone by now."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return None
    # A zombie has a status without memory.
    sizes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(sizes[0]) * 1024 if sizes else None


def _kind(process: psutil.Process) -> Kind | None:
    try:
        return kind_of(process.name(), process.cmdline())
    except psutil.Error:
        return None


def _title(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:60]}"
    except psutil.Error:
        return str(process.pid)


def _is_there(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _has_open(pid: int, folder: str) -> bool:
    try:
        links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    except OSError:
        return False
    return any(link.startswith(f"{folder}/") for link in links)
