"""The Serve application of a configuration, and a cluster on this machine that runs it.

`serve deploy` and RayService name `build_application`; `deployed.py` runs it on another Ray.
"""

import logging
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.config import HTTPOptions

from ..engine.errors import ConfigurationError, LongreachError, UnavailableError
from .autoscaling import DecodePolicy, GangPolicy, replicas_of
from .controller import ControllerKeeper
from .decode.replica import DecodeReplica
from .handlers import uninterrupted
from .ingress import api_builder, front_of
from .local_ray import LocalRay
from .nodes import default_metrics_directory
from .port_claim import claim_port
from .prefill.replica import PrefillReplica
from .readiness import READY_SECONDS, is_alive, is_ready, wait_until_ready
from .rest import build_refusal, read_api_keys
from .serve_loops import one_loop
from .settings import NodeLabels, Settings, parse_settings, read_settings
from .watch import ClusterWatch, Silent

APP_NAME = "longreach"
_PREFILL, _DECODE, _INGRESS = "prefill", "decode", "ingress"
_CLOSING = "closing"
# How the names of its replicas' actors begin.
_REPLICAS = f"SERVE_REPLICA::{APP_NAME}#"
_API_PREFIX = "/v1"

# Requests wait in queues of our own, which know what to do first and when to refuse.
_NO_LIMIT = 1_000_000
_STOP_SECONDS = 30
# Serve replaces a replica that has left three checks in a row unanswered for so long each: one that
# is starved answers one of them. Whoever hangs keeps those who stream to it from answering as well
# (Ray waits for it at a stream's end), so it has to be found before them: a proxy after 20 s, and
# then these, each 4 s after the one before.
_CHECK_SECONDS = {_INGRESS: 7.5, _DECODE: 9.0, _PREFILL: 10.5}
# More than a starved machine keeps a healthy one from answering. Ray ends this process by itself,
# and leaves everything behind, when the GCS has not answered for a minute.
_RAY_PATIENCE_SECONDS = 30.0
# Longer than Serve takes to replace a proxy that hangs, with its start on a starved machine.
_PROXY_PATIENCE_SECONDS = 75.0
# The last line of a trace, as Python writes it.
_OUR_ERROR = re.compile(rf"^{re.escape(LongreachError.__module__)}\.\w+: (.+)$", re.MULTILINE)
_logger = logging.getLogger(__name__)
LOGGING = {"log_level": "WARNING", "enable_access_log": False}


class ApplicationArguments(BaseModel):
    """What `args` of an application may say in a configuration of Ray Serve's.

    `config` is a cluster's configuration: the mapping that its YAML file holds, or the file's path
    on whichever node builds the application, which may be any.
    """

    model_config = ConfigDict(extra="forbid")

    config: dict[str, Any] | str


def build_application(arguments: ApplicationArguments) -> serve.Application:
    """The application for `import_path` of `serve deploy`, `serve run` and RayService.

    The checkpoint is not looked at here, because this may be a node without it: every rank, decode
    worker and ingress reads it on its own node, and names node and file where one is missing.

    Raises:
        ConfigurationError: the file cannot be read, or describes what cannot run.
    """
    config = arguments.config
    settings = read_settings(Path(config)) if isinstance(config, str) else parse_settings(config)
    return build(settings, settings.metrics.directory or default_metrics_directory())


def build(settings: Settings, metrics_directory: Path) -> serve.Application:
    """The application: an ingress in front of decode replicas in front of prefill gangs."""
    shutdown = settings.shutdown
    # Ray's own annotations do not know classes with an asynchronous __init__.
    deployment: Any = serve.deployment
    scaling, gangs = settings.autoscaling, []
    for name, gang in zip(prefill_names(settings), settings.gangs, strict=True):
        kind = gang.prefill
        scaled = replicas_of(kind.replicas, kind.max_replicas, GangPolicy, scaling)
        common = _common(_PREFILL, shutdown.drain_seconds)
        replicas = deployment(PrefillReplica, name=name, **scaled, **common, **_on(kind.nodes))
        gangs.append((gang.max_prompt_tokens, replicas.bind(gang, metrics_directory)))
    scaled = replicas_of(
        settings.decode.replicas, settings.decode.max_replicas, DecodePolicy, scaling
    )
    placed = _on(settings.decode.nodes)
    common = _common(_DECODE, shutdown.decode_seconds)
    decode = deployment(DecodeReplica, name=_DECODE, **scaled, **common, **placed)
    ingress = deployment(
        serve.ingress(api_builder(settings, metrics_directory, _DECODE, APP_NAME))(),
        name=_INGRESS,
        num_replicas=settings.ingress.replicas,
        **_common(_INGRESS, shutdown.ingress_seconds),
        **_on(settings.ingress.nodes),
    )
    limits = settings.limits
    bound = decode.bind(
        settings.worker, metrics_directory, gangs, limits.max_queued_requests, limits.retries
    )
    return ingress.bind(bound)


def _common(kind: str, seconds_to_finish: float) -> dict[str, float]:
    """Options of every deployment.

    Args:
        seconds_to_finish: what a replica that is asked to go has. It is killed then, so those who
            wait for others have more than these.
    """
    return {
        "max_ongoing_requests": _NO_LIMIT,
        "graceful_shutdown_timeout_s": seconds_to_finish,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": _CHECK_SECONDS[kind],
    }


def _on(nodes: NodeLabels) -> dict[str, Any]:
    """Where replicas are placed: a gang and its coordinator die together at best."""
    options: dict[str, Any] = {"num_cpus": 0, **one_loop()}
    return {"ray_actor_options": options | ({"label_selector": nodes} if nodes else {})}


def prefill_names(settings: Settings) -> list[str]:
    """Of the gangs' deployments: `prefill`, and where there are several, `prefill-` and a name."""
    if len(settings.prefill) == 1:
        return [_PREFILL]
    return [f"{_PREFILL}-{gang.name}" for gang in settings.prefill]


def deploy(settings: Settings, metrics_directory: Path) -> None:
    """Run the application where Serve runs already, in place of the one that is there, if any.

    Returns when the new one is up. Each old replica finishes what it has accepted, or hands it
    over, and where there is no room for both, the new one in its place starts only then.

    Raises:
        RuntimeError: a replica did not come up.
    """
    application = build(settings, metrics_directory)
    serve.run(application, name=APP_NAME, logging_config=LOGGING)


def build_closing() -> serve.Application:
    """The application that answers clients while the other one finishes what it has accepted.

    Serve takes the route of an application away as soon as it is to be deleted, and its proxy
    answers 404 then, by which clients understand that the address is wrong.
    """
    deployment: Any = serve.deployment
    options = {"name": _CLOSING, "ray_actor_options": {"num_cpus": 0}}
    return deployment(serve.ingress(build_refusal)(), **options).bind()


class ClusterLostError(UnavailableError):
    """Ray or its endpoint broke down under a running cluster; what was left of it was ended."""


OnLost = Callable[["LocalCluster", str], None]
"""Called once, in a thread of its own, with what broke down. Nothing has been ended then."""


class LocalCluster:
    """A cluster on this machine alone: Ray, Serve and the application. Made by `start`."""

    def __init__(
        self,
        settings: Settings,
        metrics_directory: Path,
        local_ray: LocalRay,
        claim: socket.socket,
    ) -> None:
        """
        Args:
            claim: of the endpoint's port; see `claim_port`.
        """
        self._settings = settings
        self._ray = local_ray
        self._claim = claim
        self._watch: ClusterWatch | None = None
        self._keeper = ControllerKeeper()
        self.metrics_directory = metrics_directory

    @property
    def url(self) -> str:
        """Of the endpoint."""
        return f"http://{self._settings.ingress.host}:{self._settings.ingress.port}"

    def is_ready(self) -> bool:
        """Whether the endpoint would serve requests now."""
        return is_ready(self.url)

    def wait_until_ready(self, timeout: float = READY_SECONDS) -> None:
        """Return when the endpoint would serve requests; raises as `readiness` does."""
        wait_until_ready(self.url, timeout)

    def watch(self, on_lost: OnLost) -> None:
        """Look from now on whether Ray and the endpoint are there, until the cluster is stopped."""
        self._watch = ClusterWatch(self._ray.ended, self._silent, partial(on_lost, self))
        self._watch.start()
        self._keeper.start()

    def _silent(self) -> Silent:
        silent = {f"Ray's {name}": _RAY_PATIENCE_SECONDS for name in self._ray.silent()}
        if not is_alive(self.url):
            silent[f"the endpoint at {self.url}"] = _PROXY_PATIENCE_SECONDS
        return silent

    def stop(self) -> None:
        """Let accepted requests finish, then end every process; interrupted, end them at once.

        New requests are answered with 503 meanwhile.
        """
        try:
            remove(self._settings.shutdown.drain_seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """End every process without waiting for anything; in the main thread, whatever comes."""
        self._keeper.close()
        if self._watch is not None:
            self._watch.close()
        with uninterrupted():
            self._ray.stop()
            self._claim.close()
            self._remove_metrics()

    def abandon(self) -> None:
        """What `kill` does, but for what may wait for Ray: the last resort, from any thread."""
        self._ray.kill()
        self._remove_metrics()

    def _remove_metrics(self) -> None:
        """Of a folder that was made for this cluster alone."""
        if self._settings.metrics.directory is None:
            shutil.rmtree(self.metrics_directory, ignore_errors=True)


def remove(drain_seconds: float) -> None:
    """Take the application away where Serve runs; returns when accepted requests are finished.

    New requests are answered with 503 meanwhile, and what is left after so long is cut off.
    """
    deadline = time.monotonic() + drain_seconds + _STOP_SECONDS
    _try_to_close()
    cutting = threading.Timer(drain_seconds, _cut_off)
    cutting.daemon = True
    cutting.start()
    try:
        while time.monotonic() < deadline and not _deleted():
            pass
    finally:
        cutting.cancel()


def _cut_off() -> None:
    """End every replica. Some would wait for those that come in place of others, and none comes."""
    for name in _replicas():
        with suppress(ValueError, RayError):  # it has ended meanwhile
            ray.kill(ray.get_actor(name, namespace=SERVE_NAMESPACE))


def _replicas() -> list[str]:
    """The names of Serve's replicas; none where this process has left Ray meanwhile."""
    try:
        # What Ray says that it returns are names alone.
        actors = cast(Any, ray.util.list_named_actors(all_namespaces=True))
    except RayError:
        return []
    ours = (each["name"] for each in actors if each["namespace"] == SERVE_NAMESPACE)
    return [name for name in ours if name.startswith(_REPLICAS)]


def check_room(settings: Settings, has: Mapping[str, float]) -> None:
    """Refuse a cluster that this machine has no room for: Ray would wait for more to come.

    Args:
        has: what Ray counts, `ray.cluster_resources()`.

    Raises:
        ConfigurationError: too few CPUs or GPUs, or a placement that needs other machines.
    """
    ranks = sum(gang.replicas * gang.num_ranks for gang in settings.prefill)
    alone = settings.decode.tensor_parallel == 1
    workers = settings.decode.replicas * settings.decode.tensor_parallel
    named = "decode workers" if alone else "ranks of decode workers"
    for kind, key, asked in _asks(settings):
        there = has.get(kind, 0)
        if asked > there:
            raise ConfigurationError(
                f"{ranks} prefill ranks and {workers} {named} ask for "
                f"{asked:g} {kind}s together and this machine has {there:g}; lower "
                f"prefill.{key}_per_rank, decode.{key}, or the number of ranks or replicas"
            )
    for gang in settings.prefill:
        if gang.placement == "STRICT_SPREAD" and gang.num_ranks > 1:
            raise ConfigurationError(
                f"{gang.key('placement')}, STRICT_SPREAD, wants a machine for each rank of a gang, "
                "and this is one; use STRICT_PACK"
            )
    placed = {gang.key("nodes"): gang.nodes for gang in settings.prefill}
    placed |= {"decode.nodes": settings.decode.nodes, "ingress.nodes": settings.ingress.nodes}
    for key, nodes in placed.items():
        if nodes:
            raise ConfigurationError(
                f"{key} wants nodes with labels, and this machine alone has none; leave it out, or "
                "name a Ray cluster with --address"
            )


def _asks(settings: Settings) -> Iterator[tuple[str, str, float]]:
    """Ray's word, ours, and how many of it all ranks ask for together, of gangs and of workers."""
    decode = settings.decode
    workers = decode.replicas * decode.tensor_parallel
    cpus, gpus = workers * decode.cpus, workers * decode.gpus
    for gang in settings.prefill:
        ranks = gang.replicas * gang.num_ranks
        cpus += ranks * gang.cpus_per_rank
        gpus += ranks * gang.gpus_per_rank
    # Ray counts in ten-thousandths.
    yield "CPU", "cpus", round(cpus, 4)
    yield "GPU", "gpus", round(gpus, 4)


def _close() -> None:
    """Have new requests refused. Their prefix is longer than the application's, and so wins."""
    closing = serve.RunTarget(build_closing(), f"{APP_NAME}-{_CLOSING}", _API_PREFIX, LOGGING)
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


def failure_at_start() -> str | None:
    """As `startup_failure`, of the application where Serve runs."""
    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return None
    return startup_failure(each.message for each in application.deployments.values())


def start(settings: Settings, on_lost: OnLost | None = None) -> LocalCluster:
    """Start a cluster on this machine; returns when every replica is up.

    Args:
        on_lost: called when Ray or the endpoint breaks down; without it nobody watches.

    Raises:
        ConfigurationError: API keys cannot be read, or there are too few CPUs or GPUs.
        PortInUseError: another cluster, or somebody else, has the endpoint's port.
        UnavailableError: a part of the cluster did not come up.
    """
    read_api_keys(settings.ingress.api_keys_file)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    cluster = _start_ray(settings)
    if on_lost is not None:
        cluster.watch(on_lost)
    try:
        _start_serve(settings, cluster.metrics_directory)
    except RuntimeError as error:
        reason = failure_at_start() or str(error)
        cluster.kill()
        raise UnavailableError(f"the cluster did not start: {reason}") from error
    except BaseException as error:
        # Clients may have come as soon as the endpoint was ready, which is a little before this.
        if isinstance(error, KeyboardInterrupt) and cluster.is_ready():
            cluster.stop()
        else:
            cluster.kill()
        raise
    return cluster


def _start_ray(settings: Settings) -> LocalCluster:
    """Claim the endpoint's port, and start what Serve will run on."""
    claim = claim_port(settings.ingress.host, settings.ingress.port)
    try:
        local_ray = LocalRay.start()
    except BaseException:
        claim.close()
        raise
    directory = settings.metrics.directory or Path(tempfile.mkdtemp(prefix="longreach-metrics-"))
    return LocalCluster(settings, directory, local_ray, claim)


def _start_serve(settings: Settings, metrics_directory: Path) -> None:
    check_room(settings, ray.cluster_resources())
    options = HTTPOptions(host=settings.ingress.host, port=settings.ingress.port)
    serve.start(http_options=options, controller_options=front_of(settings), logging_config=LOGGING)
    deploy(settings, metrics_directory)
