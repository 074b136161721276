"""A node's figures over HTTP, by a process that outlives those which write them."""

import errno
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from socketserver import BaseServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from ...engine.errors import ConfigurationError
from .exposition import FolderCollector


def export(directory: Path, host: str, port: int) -> tuple[BaseServer, threading.Thread]:
    """Answer scrapes with the figures in a folder and those below it, until the server is closed.

    Reads files alone, and so needs neither Ray nor the processes: it may run beside them, in
    another container of a pod that has the folder, and be there before and after them.

    Args:
        host: a name or an address of this machine, "" for all; one of IPv6 may stand in brackets,
            as in a URL.

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
        server = _listening(host, port)
    except OSError as error:
        taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        raise ConfigurationError(
            f"scrapes cannot be answered on port {port} of {host} ({error.strerror}); take "
            f"another {'--port' if taken else '--host'}"
        ) from error
    server.set_app(plainly)
    thread = threading.Thread(target=server.serve_forever, name="exporter", daemon=True)
    thread.start()
    return server, thread


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each scrape."""

    daemon_threads = True

    def __init__(self, family: socket.AddressFamily, address: Any) -> None:
        self.address_family = family
        super().__init__(address, _Handler)


def _listening(host: str, port: int) -> _Server:
    """At the first of a host's addresses that is one of this machine's and free.

    Raises:
        OSError: there is none; why not, of the last.
    """
    found = socket.getaddrinfo(
        _without_brackets(host) or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    for number, (family, _, _, _, address) in enumerate(found, start=1):
        try:
            return _Server(family, address)
        except OSError:
            if number == len(found):
                raise
    raise OSError(errno.EADDRNOTAVAIL, "it has no address")


def _without_brackets(host: str) -> str:
    """An address of IPv6 by itself, where it stands in the brackets that it has in a URL."""
    inner = host[1:-1]
    if host != f"[{inner}]":
        return host
    try:
        return str(ipaddress.IPv6Address(inner))
    except ValueError:
        return host


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no news."""
