"""A node's figures over HTTP, by a process that outlives those which write them."""

import threading
from pathlib import Path
from socketserver import BaseServer

from prometheus_client import CollectorRegistry, start_http_server

from ...engine.errors import ConfigurationError
from .exposition import FolderCollector


def export(directory: Path, host: str, port: int) -> tuple[BaseServer, threading.Thread]:
    """Answer scrapes with the figures in a folder and those below it, until the server is closed.

    Reads files alone, and so needs neither Ray nor the processes: it may run beside them, in
    another container of a pod that has the folder, and be there before and after them.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    registry = CollectorRegistry()
    registry.register(FolderCollector(directory))
    try:
        return start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigurationError(
            f"scrapes cannot be answered on port {port} of {host} ({error.strerror}); take "
            "another --port"
        ) from error
