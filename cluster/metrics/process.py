"""What a process is and takes: its version, its memory, its time."""

import threading
from importlib.metadata import version

import psutil

from . import vocabulary as metrics
from .writer import Metrics

_SECONDS = 5.0


class ProcessFigures:
    """Has a writer tell, again and again, what its process takes; ends with the process.

    Args:
        seconds: between two looks.
    """

    def __init__(self, sink: Metrics, seconds: float = _SECONDS) -> None:
        self._sink = sink
        self._seconds = seconds
        self._process = psutil.Process()
        self._cpu_seconds = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="process-figures", daemon=True)

    def start(self) -> None:
        """Tell for the first time, and go on in a thread of its own."""
        versions = {name: version(name) for name in ("longreach", "ray", "torch")}
        self._sink.set(metrics.BUILD_INFO, 1, **versions)
        self._sink.set(metrics.PROCESS_START_TIME, self._process.create_time())
        self._sink.set(metrics.PROCESSES, 1)
        self._tell()
        self._thread.start()

    def close(self) -> None:
        """Tell nothing more; for a writer that is closed before its process ends."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._seconds):
            self._tell()

    def _tell(self) -> None:
        with self._process.oneshot():
            times = self._process.cpu_times()
            resident = self._process.memory_info().rss
        used = times.user + times.system
        self._sink.add(metrics.PROCESS_CPU_SECONDS, max(used - self._cpu_seconds, 0.0))
        self._cpu_seconds = used
        self._sink.set(metrics.PROCESS_RESIDENT_BYTES, resident)
        self._sink.set(metrics.PROCESS_OPEN_FILES, self._process.num_fds())
