"""One port, one cluster."""

import pickle
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from longreach.cluster.port_claim import PortInUseError, claim_port

from ..prometheus import free_port

HOST = "127.0.0.1"


@contextmanager
def proxy(port: int) -> Iterator[socket.socket]:
    """Listens as Serve's proxies do."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((HOST, port))
        listening.listen(16)
        yield listening


@pytest.mark.parametrize("host", [HOST, "0.0.0.0"])
def test_a_port_is_claimed_once(host: str) -> None:
    port = free_port()
    with closing(claim_port(HOST, port)):
        with pytest.raises(PortInUseError) as refused:
            claim_port(host, port)
        assert (refused.value.host, refused.value.port) == (host, port)
    claim_port(host, port).close()


def test_of_two_at_once_one_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes when the first is bound already, and gets further before that goes on."""
    port, bind, rivals = free_port(), socket.socket.bind, []

    def bind_and_wait(claim: socket.socket, address: tuple[str, int]) -> None:
        bind(claim, address)
        if not rivals:
            rivals.append(None)
            rivals[0] = claim_port(HOST, port)

    monkeypatch.setattr(socket.socket, "bind", bind_and_wait)
    with pytest.raises(PortInUseError) as refused:
        claim_port(HOST, port)
    assert refused.value.port == port
    [rival] = rivals
    rival.close()


def test_our_proxies_bind_beside_the_claim_and_get_every_connection() -> None:
    port = free_port()
    with closing(claim_port(HOST, port)), proxy(port) as first, proxy(port):
        first.settimeout(0)
    with closing(claim_port(HOST, port)), proxy(port) as only:
        for _ in range(16):
            with socket.create_connection((HOST, port), timeout=5) as client:
                accepted, address = only.accept()
                accepted.close()
                assert address == client.getsockname()


def test_a_proxy_that_outlived_its_cluster_is_found() -> None:
    """A claim ends with its process; what listens beside it may not have."""
    port = free_port()
    with proxy(port), pytest.raises(PortInUseError):
        claim_port(HOST, port)


def test_connections_of_the_last_cluster_do_not_keep_the_port() -> None:
    """The kernel remembers for a minute those that the server closed."""
    port = free_port()
    with proxy(port) as listening:
        client = socket.create_connection((HOST, port), timeout=5)
        accepted, _ = listening.accept()
        accepted.close()
        client.close()
    claim_port(HOST, port).close()


def test_other_failures_are_told_as_they_are() -> None:
    with pytest.raises(OSError, match="assign requested address"):
        claim_port("192.0.2.1", free_port())


def test_the_error_travels_between_processes() -> None:
    again = pickle.loads(pickle.dumps(PortInUseError(HOST, 8000)))
    assert (again.host, again.port) == (HOST, 8000)
