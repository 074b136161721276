"""The Serve application of a configuration, and a cluster on this machine that runs it."""

import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions

from ..engine.errors import ConfigurationError, LongreachError, UnavailableError
from .decode.replica import DecodeReplica
from .ingress import api_builder
from .prefill.replica import PrefillReplica
from .readiness import is_ready
from .rest import build_refusal, read_api_keys
from .settings import Settings

APP_NAME = "longreach"
_PREFILL, _DECODE, _INGRESS = "prefill", "decode", "ingress"
_CLOSING = "closing"
_API_PREFIX = "/v1"

# Requests wait in queues of our own, which know what to do first and when to refuse.
_NO_LIMIT = 1_000_000
_READY_SECONDS = 300
_POLL_SECONDS = 0.1
_STOP_SECONDS = 30
# The last line of a trace, as Python writes it.
_OUR_ERROR = re.compile(rf"^{re.escape(LongreachError.__module__)}\.\w+: (.+)$", re.MULTILINE)
_logger = logging.getLogger(__name__)
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}


def build(settings: Settings, metrics_directory: Path) -> serve.Application:
    """The application: an ingress in front of decode replicas in front of prefill gangs."""
    common = {
        "max_ongoing_requests": _NO_LIMIT,
        "graceful_shutdown_timeout_s": settings.shutdown.drain_seconds,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,
        "ray_actor_options": {"num_cpus": 0},
    }
    # Ray's own annotations do not know classes with an asynchronous __init__.
    deployment: Any = serve.deployment
    prefill = deployment(
        PrefillReplica, name=_PREFILL, num_replicas=settings.prefill.replicas, **common
    )
    decode = deployment(
        DecodeReplica, name=_DECODE, num_replicas=settings.decode.replicas, **common
    )
    ingress = deployment(
        serve.ingress(api_builder(settings, metrics_directory, _DECODE, APP_NAME))(),
        name=_INGRESS,
        num_replicas=settings.ingress.replicas,
        **common,
    )
    return ingress.bind(
        decode.bind(settings, metrics_directory, prefill.bind(settings, metrics_directory))
    )


def deploy(settings: Settings, metrics_directory: Path) -> None:
    """Run the application where Serve runs already, in place of the one that is there, if any.

    Returns when the new one is up. Each old replica finishes what it has accepted, and where there
    is no room for both, the new one in its place starts only then.

    Raises:
        RuntimeError: a replica did not come up.
    """
    application = build(settings, metrics_directory)
    serve.run(application, name=APP_NAME, logging_config=_LOGGING)


def build_closing() -> serve.Application:
    """The application that answers clients while the other one finishes what it has accepted.

    Serve takes the route of an application away as soon as it is to be deleted, and its proxy
    answers 404 then, by which clients understand that the address is wrong.
    """
    deployment: Any = serve.deployment
    options = {"name": _CLOSING, "ray_actor_options": {"num_cpus": 0}}
    return deployment(serve.ingress(build_refusal)(), **options).bind()


class LocalCluster:
    """A cluster on this machine alone: Ray, Serve and the application. Made by `start`."""

    def __init__(self, settings: Settings, metrics_directory: Path, temporary: bool) -> None:
        self._settings = settings
        self.metrics_directory = metrics_directory
        self._temporary = temporary

    @property
    def url(self) -> str:
        """Of the endpoint."""
        return f"http://{self._settings.ingress.host}:{self._settings.ingress.port}"

    def wait_until_ready(self, timeout: float = _READY_SECONDS) -> None:
        """Return when the endpoint would serve requests.

        Raises:
            UnavailableError: time is up.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if is_ready(self.url):
                return
            time.sleep(_POLL_SECONDS)
        raise UnavailableError(f"the cluster was not ready after {timeout:.0f} s")

    def stop(self) -> None:
        """Let accepted requests finish, then end every process; interrupted, end them at once.

        New requests are answered with 503 meanwhile.
        """
        deadline = time.monotonic() + self._settings.shutdown.drain_seconds + _STOP_SECONDS
        try:
            _try_to_close()
            while time.monotonic() < deadline and not _deleted():
                pass
        finally:
            self.kill()

    def kill(self) -> None:
        """End every process without waiting for anything."""
        ray.shutdown()
        if self._temporary:
            shutil.rmtree(self.metrics_directory, ignore_errors=True)


def check_room(settings: Settings, has: Mapping[str, float]) -> None:
    """Refuse a cluster that this machine has no room for: Ray would wait for more to come.

    Args:
        has: what Ray counts, `ray.cluster_resources()`.

    Raises:
        ConfigurationError: too few CPUs or GPUs, or a placement that needs more machines.
    """
    prefill, decode = settings.prefill, settings.decode
    ranks = prefill.replicas * prefill.num_ranks
    for kind, rank, worker, keys in (
        ("CPU", prefill.cpus_per_rank, decode.cpus, "prefill.cpus_per_rank, decode.cpus"),
        ("GPU", prefill.gpus_per_rank, decode.gpus, "prefill.gpus_per_rank, decode.gpus"),
    ):
        # Ray counts in ten-thousandths.
        asked, there = round(ranks * rank + decode.replicas * worker, 4), has.get(kind, 0)
        if asked > there:
            raise ConfigurationError(
                f"{ranks} prefill ranks and {decode.replicas} decode workers ask for {asked:g} "
                f"{kind}s together and this machine has {there:g}; lower {keys}, or the number "
                "of ranks or replicas"
            )
    if prefill.placement == "STRICT_SPREAD" and prefill.num_ranks > 1:
        raise ConfigurationError(
            "prefill.placement STRICT_SPREAD wants a machine for each rank of a gang, and this "
            "is one; use STRICT_PACK"
        )


def _close() -> None:
    """Have new requests refused. Their prefix is longer than the application's, and so wins."""
    closing = serve.RunTarget(build_closing(), f"{APP_NAME}-{_CLOSING}", _API_PREFIX, _LOGGING)
    serve.run_many([closing], wait_for_applications_running=False)


def _try_to_close() -> None:
    """What waits for its answer comes first: where this fails, new requests get Serve's 404."""
    try:
        _close()
    except (TimeoutError, RuntimeError, RayError) as error:
        _logger.warning("new requests will not be told that the cluster stops: %s", error)


def _deleted() -> bool:
    """Have Serve stop the application; False where it takes longer than Serve waits, a minute."""
    try:
        serve.delete(APP_NAME)
    except TimeoutError:
        return False
    return True


def startup_failure(messages: Iterable[str]) -> str | None:
    """What a replica raised on purpose while it started; None where it was nothing of ours.

    Args:
        messages: of deployments that did not come up. Serve keeps traces there, and no exceptions.
    """
    said = [_OUR_ERROR.findall(message) for message in messages]
    return next((errors[-1] for errors in said if errors), None)


def _startup_failure() -> str | None:
    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return None
    return startup_failure(each.message for each in application.deployments.values())


def start(settings: Settings) -> LocalCluster:
    """Start a cluster on this machine; returns when every replica is up.

    Raises:
        ConfigurationError: API keys cannot be read, or there are too few CPUs or GPUs.
        UnavailableError: a part of the cluster did not come up.
    """
    read_api_keys(settings.ingress.api_keys_file)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    directory = settings.metrics.directory
    cluster = LocalCluster(
        settings,
        directory or Path(tempfile.mkdtemp(prefix="longreach-metrics-")),
        temporary=directory is None,
    )
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        check_room(settings, ray.cluster_resources())
        options = HTTPOptions(host=settings.ingress.host, port=settings.ingress.port)
        serve.start(http_options=options, logging_config=_LOGGING)
        deploy(settings, cluster.metrics_directory)
    except RuntimeError as error:
        reason = _startup_failure() or str(error)
        cluster.kill()
        raise UnavailableError(f"the cluster did not start: {reason}") from error
    except BaseException:
        cluster.kill()
        raise
    return cluster
