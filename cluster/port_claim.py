"""The endpoint's port belongs to one cluster, for as long as that cluster lives."""

import errno
import socket

from ..engine.errors import LongreachError


class PortInUseError(LongreachError):
    """Somebody listens on the endpoint's port already, or has claimed it."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(
            f"port {port} of {host} is in use; stop what listens there, or set another ingress.port"
        )
        self.host = host
        self.port = port

    def __reduce__(self) -> tuple[type["PortInUseError"], tuple[str, int]]:
        return type(self), (self.host, self.port)


def claim_port(host: str, port: int) -> socket.socket:
    """A socket that is bound to the port and does not listen. Close it to give the port up.

    Serve's proxies bind with SO_REUSEPORT, so the kernel would let the proxy of a second cluster
    join the first one's and deal clients out to both. While a claim is open, our own proxies can
    bind beside it, and a second claim is refused.

    Raises:
        PortInUseError: the port is taken.
        OSError: the address is not one of this machine, or the port needs privileges.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    claim = socket.socket(family, kind, protocol)
    try:
        _take(claim, address)
    except OSError as error:
        claim.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(host, port) from error
        raise
    return claim


def _take(claim: socket.socket, address: tuple) -> None:
    """Bind alone, then let others of this user in.

    SO_REUSEADDR is for the connections of an earlier cluster, which the kernel remembers for a
    minute. With it two claims could bind at once, but only one of them can listen: that decides.
    The order below leaves no moment in which another claim would succeed. Sockets that only the
    options changed keep their port when they stop to listen.
    """
    claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    claim.bind(address)
    claim.listen(1)
    claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    claim.shutdown(socket.SHUT_RDWR)
