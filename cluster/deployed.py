"""The application on a Ray cluster that runs already, of however many nodes."""

import logging
from typing import Any, cast

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client

from ..engine.errors import ConfigurationError, UnavailableError
from .app import LOGGING, deploy, failure_at_start, remove
from .ingress import front_of
from .joining import join_ray
from .nodes import default_metrics_directory
from .readiness import wait_until_ready
from .settings import IngressSettings, Settings

_ANY_ADDRESS = ("0.0.0.0", "::")


class DeployedCluster:
    """The application on somebody else's Ray. Made by `deploy_at`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @property
    def url(self) -> str:
        """Of the endpoint; on this node where it listens on every address."""
        ingress = self._settings.ingress
        host = ray.util.get_node_ip_address() if ingress.host in _ANY_ADDRESS else ingress.host
        return f"http://{host}:{ingress.port}"

    def wait_until_ready(self) -> None:
        """Return when the endpoint would serve requests; raises as `readiness` does."""
        wait_until_ready(self.url)

    def stop(self) -> None:
        """Let accepted requests finish, and take the application away; Ray and Serve stay."""
        try:
            remove(self._settings.shutdown.drain_seconds)
        finally:
            self.leave()

    def kill(self) -> None:
        """Leave without waiting: nothing here is ours to end."""
        self.leave()

    def leave(self) -> None:
        """Disconnect from Ray; the application stays as it is."""
        ray.shutdown()


def deploy_at(address: str, settings: Settings) -> DeployedCluster:
    """Deploy on the Ray cluster at an address, in place of the application that is there, if any.

    Starts Serve where it does not run; proxies that run keep their address, port and limits.
    Returns when every replica is up. Ray waits for room that is not there yet.

    Args:
        address: as of `ray.init`: "auto", or host:port of the GCS.

    Raises:
        UnavailableError: no Ray is there, or a part of the application did not come up.
        ConfigurationError: Serve listens elsewhere than the settings say.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _join(address)
    try:
        _start_serve(settings)
        deploy(settings, settings.metrics.directory or default_metrics_directory())
    except RuntimeError as error:
        reason = failure_at_start() or str(error)
        ray.shutdown()
        raise UnavailableError(f"the application did not start: {reason}") from error
    except BaseException:
        ray.shutdown()
        raise
    return DeployedCluster(settings)


def _join(address: str) -> None:
    try:
        join_ray(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UnavailableError(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start`, name "
            "its address, or leave --address out to have one started here"
        ) from error


def _start_serve(settings: Settings) -> None:
    ingress = settings.ingress
    serve.start(
        proxy_location=ProxyLocation.EveryNode,
        http_options=HTTPOptions(host=ingress.host, port=ingress.port),
        controller_options=front_of(settings),
        logging_config=LOGGING,
    )
    check_listens(cast(Any, _get_global_client()).http_config, ingress)


def check_listens(proxies: HTTPOptions, ingress: IngressSettings) -> None:
    """Refuse an address that Serve's proxies, which may have run before, do not have.

    Raises:
        ConfigurationError: they listen elsewhere.
    """
    if (proxies.host, proxies.port) != (ingress.host, ingress.port):
        raise ConfigurationError(
            f"Ray Serve listens on port {proxies.port} of {proxies.host} there, and keeps that "
            f"while it runs; set ingress.host {proxies.host} and ingress.port {proxies.port}, or "
            "stop it first with `serve shutdown`"
        )
