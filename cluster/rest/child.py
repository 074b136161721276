"""A process beside this one, for work that may hold Python's lock, grow, hang or crash.

It does one job after the other, is ended when a job takes too long, and replaced when it has grown.
It ends by itself when this process does: its standard input is closed then.
"""

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

import psutil

from ...engine.errors import LongreachError
from .errors import RestError

logger = logging.getLogger(__name__)

_START_SECONDS = 120.0

Work = Callable[..., Any]


class ChildDiedError(Exception):
    """The process died over a job, or was ended because it took too long."""


class ChildProcess:
    """The process, started when it is needed. All but `start` are for one thread.

    Args:
        module: whose `serve()` runs there; it calls this module's.
        setup: what that is given; pickled.
        seconds: that one job may take.
    """

    def __init__(self, module: str, setup: object, seconds: float) -> None:
        self._module, self._setup, self._seconds = module, setup, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    def start(self) -> "subprocess.Popen[bytes]":
        """The process, which may still be loading what it needs."""
        if self._process is None or self._process.poll() is not None:
            # It must find the packages that this process found, however that was set up.
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {self._module} import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            self._is_ready = False
            _put(self._process.stdin, self._setup)
        return self._process

    def do(self, *job: Any) -> Any:
        """What the process makes of a job.

        Raises:
            ChildDiedError: it died.
            Exception: whatever it raised.
        """
        goes_on = False
        process = self.start()
        output = cast(IO[bytes], process.stdout)
        try:
            if not self._is_ready:
                with _killed_after(process, _START_SECONDS):
                    self._is_ready = pickle.load(output)
            with _killed_after(process, self._seconds):
                _put(process.stdin, job)
                outcome, goes_on = pickle.load(output)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise ChildDiedError from error
        finally:
            if not goes_on:
                self._replace()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def end(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _replace(self) -> None:
        """End the process, whose memory goes back, and start the next one."""
        self.end()
        self.start()


@contextmanager
def _killed_after(process: "subprocess.Popen[bytes]", seconds: float) -> Iterator[None]:
    too_long = threading.Timer(seconds, process.kill)
    too_long.start()
    try:
        yield
    finally:
        too_long.cancel()


def serve(begin: Callable[[Any], Work], most_growth_bytes: int) -> None:
    """Do jobs from standard input until it is closed.

    Args:
        begin: makes what does the jobs, from the setup.
        most_growth_bytes: by how much this process may have grown, over what it takes to begin,
            before it is replaced.
    """
    # Ctrl-C is for whoever started us, and closes our input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not come between answers
    work = begin(pickle.load(sys.stdin.buffer))
    # What is resident now: the most that ever was counts what started this process as well.
    resident = psutil.Process().memory_info
    began_with = resident().rss
    _put(answers, True)
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        outcome = _outcome(work, job)
        _put(answers, (outcome, resident().rss - began_with <= most_growth_bytes))
        del job, outcome


def _outcome(work: Work, job: tuple[Any, ...]) -> Any:
    """What a job returned, or what it raised, fit to travel."""
    try:
        return work(*job)
    except (RestError, LongreachError) as error:
        return error
    except Exception:
        return RuntimeError(traceback.format_exc())


def _put(pipe: IO[bytes] | None, value: object) -> None:
    assert pipe is not None
    pickle.dump(value, pipe)
    pipe.flush()
