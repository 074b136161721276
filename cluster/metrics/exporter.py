"""A node's figures over HTTP, by a process that outlives those which write them."""

import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from socketserver import BaseServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

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
    answer = make_wsgi_app(registry)

    def plainly(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        # Asked for OpenMetrics, as Prometheus does, prometheus-client writes `vllm_` for `vllm:`.
        environ.pop("HTTP_ACCEPT", None)
        return answer(environ, start_response)

    try:
        server = make_server(host, port, plainly, _Server, _Handler)
    except OSError as error:
        raise ConfigurationError(
            f"scrapes cannot be answered on port {port} of {host} ({error.strerror}); take "
            "another --port"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="exporter", daemon=True)
    thread.start()
    return server, thread


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each scrape."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no news."""
