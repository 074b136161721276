"""What this process does at Ctrl-C and SIGTERM, kept through what changes it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HANDLED = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put both handlers back in the end. Only the main thread can, and only it runs them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore both: what they ask for is being done."""
    with handlers_kept():
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                signal.signal(number, signal.SIG_IGN)
        yield
