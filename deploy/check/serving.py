"""Whether what a RayService serves can run: the configuration in its manifest, and its pods."""

from collections.abc import Iterable, Iterator
from typing import Any

import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from ...cluster.app import prefill_names
from ...cluster.ingress import front_of
from ...cluster.remedies import remedied
from ...cluster.settings import Settings, check_model, parse_settings, warnings_about
from ...engine.errors import LongreachError
from . import room
from .kubectl import Manifest, name_of
from .pods import Pod, pods_of
from .problems import Problem

BUILDER = "longreach.cluster.app:build_application"
_STOP_SECONDS = 30.0
"""What a cluster takes to stop when its requests are finished."""


def problems(manifests: Iterable[Manifest]) -> Iterator[Problem]:
    """Of every RayService among these objects."""
    for manifest in manifests:
        if manifest.get("kind") == "RayService":
            for what in _of_service(manifest):
                yield Problem(name_of(manifest), what)


def serve_config(service: Manifest) -> dict[str, Any]:
    """What Ray Serve gets of a RayService."""
    return yaml.safe_load(service["spec"]["serveConfigV2"]) or {}


def cluster_config(config: dict[str, Any]) -> dict[str, Any]:
    """The cluster's configuration within one of Ray Serve.

    Raises:
        KeyError: there is none.
    """
    (application,) = config["applications"]
    return application["args"]["config"]


def _of_service(service: Manifest) -> Iterator[str]:
    config = serve_config(service)
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        yield f"serveConfigV2 is none of Ray Serve's: {error.errors()[0]['msg']}; correct it"
        return
    if [each["import_path"] for each in config["applications"]] != [BUILDER]:
        yield f"serveConfigV2 serves something else; set import_path {BUILDER}"
        return
    try:
        settings = parse_settings(_runnable_here(cluster_config(config)), "serveConfigV2")
        check_model(settings)
    except LongreachError as error:
        yield str(remedied(error))
        return
    yield from warnings_about(settings)
    yield from _of_application(config, settings)
    yield from _of_ending(service, settings)
    workers = [pod for pod in pods_of(service) if pod.name != "head"]
    for pod in workers:
        yield from _of_folders(pod, settings)
    yield from room.problems(settings, workers, _replica_cpus(config))


def front_environment(settings: Settings) -> dict[str, str]:
    """What has Serve's proxies put our front before the ingress."""
    return (front_of(settings).runtime_env or {})["env_vars"]


def _meaning(value: str | None) -> Any:
    """Of a variable whose value may be JSON, however it is written."""
    return yaml.safe_load(value) if value else value


def _runnable_here(config: dict[str, Any]) -> dict[str, Any]:
    """With the shape of a published model in place of a checkpoint that no one has here."""
    model = config.get("model", {})
    if str(model.get("path", "")).startswith("/models/"):
        model = {**model, "path": f"random/{model.get('name')}"}
    return {**config, "model": model}


def _of_application(config: dict[str, Any], settings: Settings) -> Iterator[str]:
    listens = config.get("http_options", {})
    ingress = settings.ingress
    if (listens.get("host"), listens.get("port")) != (ingress.host, ingress.port):
        yield (
            f"http_options is {listens} and ingress.host and port are {ingress.host} and "
            f"{ingress.port}; make them the same"
        )
    if ingress.host == "127.0.0.1":
        yield "ingress.host is 127.0.0.1, where nobody reaches it; set 0.0.0.0"
    if ingress.api_keys_file is None:
        yield "everybody who reaches the service is served; set ingress.api_keys_file"
    environment = config.get("controller_options", {}).get("runtime_env", {}).get("env_vars", {})
    for name, value in front_environment(settings).items():
        if _meaning(environment.get(name)) != _meaning(value):
            yield (
                f"Serve would run otherwise than by `longreach serve`; set {name} in "
                f"controller_options to {value}"
            )
    asked = _replica_cpus(config)
    for name in ("ingress", "decode", *prefill_names(settings)):
        if not asked.get(name):
            yield (
                f"replicas of {name} ask for no CPU and may come to the head, which has no "
                f"checkpoint; set a part of one in deployments, ray_actor_options.num_cpus"
            )


def _replica_cpus(config: dict[str, Any]) -> dict[str, float]:
    """CPUs that a replica of each deployment asks for."""
    (application,) = config["applications"]
    return {
        each["name"]: each.get("ray_actor_options", {}).get("num_cpus", 0.0)
        for each in application.get("deployments", [])
    }


def _of_ending(service: Manifest, settings: Settings) -> Iterator[str]:
    """Accepted requests must have the time that the settings promise them.

    Of a worker pod, which may have an ingress whose requests are handed over to other pods.
    """
    shutdown = settings.shutdown
    drain, ends = shutdown.drain_seconds, shutdown.ingress_seconds
    for pod in pods_of(service):
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        needed = (drain if pod.name == "head" else ends) + _STOP_SECONDS
        if grace < needed:
            yield (
                f"{pod.name}: terminationGracePeriodSeconds ({grace}) cuts off what "
                f"shutdown.drain_seconds ({drain:g}) and hand_over_seconds "
                f"({shutdown.hand_over_seconds:g}) let finish; make it {needed:g} or more, or "
                "lower these"
            )
        if pod.name != "head":
            yield from _of_drain(pod, ends)
    kept = service["spec"].get("rayClusterDeletionDelaySeconds", 60)
    needed = drain + _STOP_SECONDS
    if kept < needed:
        yield (
            f"rayClusterDeletionDelaySeconds ({kept}) ends the old cluster of an upgrade before "
            f"shutdown.drain_seconds ({drain:g}); make it {needed:g} or more"
        )


def _of_drain(pod: Pod, seconds: float) -> Iterator[str]:
    hook = pod.main.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    if hook[:2] != ["longreach", "drain"]:
        yield f"{pod.name}: ends while requests are under way; set preStop to `longreach drain`"
    elif f"--seconds={seconds:g}" not in hook:
        yield (
            f"{pod.name}: preStop drains for other than shutdown.drain_seconds and "
            f"hand_over_seconds together; set --seconds={seconds:g}"
        )


def _of_folders(pod: Pod, settings: Settings) -> Iterator[str]:
    mounts = [mount["mountPath"] for mount in pod.main.get("volumeMounts", [])]
    figures, keys = settings.metrics.directory, settings.ingress.api_keys_file
    served = [
        each["command"]
        for each in pod.containers
        if each.get("command", [])[:2] == ["longreach", "exporter"]
    ]
    if figures is None or not any(str(figures) in command for command in served):
        yield f"{pod.name}: no exporter of metrics.directory ({figures}); add one beside Ray"
    for path in (figures, keys):
        if path is not None and not any(path.is_relative_to(mount) for mount in mounts):
            yield f"{pod.name}: {path} is in no volume; mount one there"
