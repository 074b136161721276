"""Ray on this machine alone: reachable from this machine only, and gone when it is stopped."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import psutil
import ray
from ray import _raylet
from ray._private import ray_constants
from ray._private.grpc_utils import init_grpc_channel

from ..engine.errors import UnavailableError
from .joining import join_ray
from .process_tree import adopt_orphans, collect_orphans, kill_session

_GCS, _RAYLET = "gcs_server", "raylet"
_ANSWER_SECONDS = 2.0
_DISCONNECT_SECONDS = 10.0
# Harmless ones: what matters is whether they are answered, and how to those without a token.
_METHODS = {
    _GCS: "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    _RAYLET: "/ray.rpc.NodeManagerService/GetSystemConfig",
}

logger = logging.getLogger(__name__)


class LocalRay:
    """A Ray that this process started. Made by `start`."""

    def __init__(self, session: Path, addresses: dict[str, str]) -> None:
        """
        Args:
            session: the folder in which its processes write their logs.
            addresses: host:port of the GCS and of the raylet, by their names.
        """
        self._session = session
        self._addresses = addresses
        self._processes = {
            process.name(): process
            for process in psutil.Process().children()
            if process.name() in addresses and str(session) in " ".join(process.cmdline())
        }

    @classmethod
    def start(cls) -> "LocalRay":
        """Start Ray and connect to it. Handlers of SIGINT and SIGTERM stay as they are.

        Raises:
            UnavailableError: Ray would answer strangers, or other machines.
        """
        adopt_orphans()
        _set_up_ray()
        with _on_loopback():
            context = join_ray("local", include_dashboard=False)
        info = context.address_info
        node = next(iter(ray.nodes()))
        raylet = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        started = cls(Path(info["session_dir"]), {_GCS: info["gcs_address"], _RAYLET: raylet})
        try:
            check_address(info["node_ip_address"])
            check_tokens(started._addresses)
        except BaseException:
            started.stop()
            raise
        return started

    def ended(self) -> str | None:
        """Which process ended that a cluster cannot do without; None while both are there."""
        for name in self._addresses:
            process = self._processes.get(name)
            if process is None or _is_gone(process):
                return f"Ray's {name} (process {process.pid if process else 'unknown'}) ended"
        return None

    def silent(self) -> list[str]:
        """The names of those two that do not answer now."""
        return [name for name, at in self._addresses.items() if not _answers(name, at)]

    def stop(self) -> None:
        """Disconnect, and end every process of this Ray, whatever state it is in."""
        disconnecting = threading.Thread(target=ray.shutdown, daemon=True)
        disconnecting.start()
        # It waits without end for a process that is stopped, and returns once that is dead.
        disconnecting.join(_DISCONNECT_SECONDS if self.ended() is None else 0)
        self.kill()
        disconnecting.join(_DISCONNECT_SECONDS)
        collect_orphans("ray::")

    def kill(self) -> None:
        """Kill every process of this Ray, from any thread."""
        if left := kill_session(self._session):
            logger.error("processes %s do not end although they were killed", left)


def _is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def _set_up_ray() -> None:
    """Have Ray's processes serve nobody without the token, which Ray makes if there is none.

    And have actors not stand behind whatever else runs on the machine, as Ray does by default: a
    busy client beside them made `/health` wait for half a second. The environment is the only
    place where Ray looks, and this process may have read it already.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # as Ray spells it
    cast(Any, _raylet).Config.initialize("")


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray take 127.0.0.1 for this node's address, and listen on no other.

    It does so by itself on macOS and Windows, and elsewhere replaces 127.0.0.1 by another address
    of the machine wherever it is given.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def check_address(address: str) -> None:
    """Refuse a Ray that other machines can reach.

    Raises:
        UnavailableError: it is not on 127.0.0.1.
    """
    if address != "127.0.0.1":
        raise UnavailableError(
            f"Ray would listen on {address}, where other machines can reach it; install the "
            "version of Ray that constraints.txt names"
        )


def check_tokens(addresses: dict[str, str]) -> None:
    """Ask as a stranger would.

    Raises:
        UnavailableError: one of them answers without a token.
    """
    for name, address in addresses.items():
        with grpc.insecure_channel(address) as channel:
            code = _ask(name, channel)
        if code is not grpc.StatusCode.UNAUTHENTICATED:
            raise UnavailableError(
                f"Ray's {name} does not ask for a token ({code}), so that everybody who reaches "
                "its port could run code here; install the version of Ray that constraints.txt "
                "names"
            )


def _answers(name: str, address: str) -> bool:
    with cast(grpc.Channel, init_grpc_channel(address)) as channel:
        code = _ask(name, channel)
    return code not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)


def _ask(name: str, channel: grpc.Channel) -> grpc.StatusCode:
    try:
        channel.unary_unary(_METHODS[name])(b"", timeout=_ANSWER_SECONDS)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
