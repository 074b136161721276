"""What pods here must be: not root, with limits and probes, of pinned images, without secrets."""

import re
from collections.abc import Iterable, Iterator, Sequence

from .kubectl import Manifest, name_of
from .pods import Pod, pods_of
from .problems import Problem

_PINNED = re.compile(r".+:(?!latest$)[\w.-]*\d[\w.-]*(@sha256:[0-9a-f]{64})?$")
_SECRET_NAME = re.compile(r"password|secret|token|api_?key", re.IGNORECASE)
_SHARED_MEMORY = "/dev/shm"


def problems(manifests: Sequence[Manifest]) -> Iterator[Problem]:
    """Of all pods of these objects, and of the objects themselves."""
    for manifest in manifests:
        where = name_of(manifest)
        if manifest.get("kind") == "Secret":
            yield Problem(where, "a secret in a manifest; have it made by `kubectl create secret`")
        if manifest.get("kind") == "PodDisruptionBudget":
            for what in _of_disruption(manifest["spec"], manifests):
                yield Problem(where, what)
        for pod in pods_of(manifest):
            for what in _of_pod(pod):
                yield Problem(f"{where}, {pod.name}", what)


def _of_disruption(budget: Manifest, manifests: Iterable[Manifest]) -> Iterator[str]:
    """Kubernetes knows of the pods that an operator makes no more than those that there are."""
    wanted = budget["selector"]["matchLabels"].items()
    count = sum(
        pod.replicas
        for manifest in manifests
        for pod in pods_of(manifest)
        if wanted <= pod.template.get("metadata", {}).get("labels", {}).items()
    )
    if budget.get("minAvailable") != count - 1:
        yield (
            f"lets other than one of its {count} pods go at a time, or says it in a way that does "
            f"not hold for an operator's pods; set minAvailable {count - 1} alone"
        )


def _of_pod(pod: Pod) -> Iterator[str]:
    security = pod.spec.get("securityContext", {})
    if not security.get("runAsNonRoot") or not security.get("runAsUser"):
        yield "may run as root; set securityContext.runAsNonRoot and runAsUser"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile; set securityContext.seccompProfile.type RuntimeDefault"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(key):
            yield f"shares the host's namespaces; remove {key}"
    for volume in pod.spec.get("volumes", []):
        if "hostPath" in volume:
            yield f"volume {volume['name']} is of the host; take an emptyDir or a claim"
        if "emptyDir" in volume and not (volume["emptyDir"] or {}).get("sizeLimit"):
            yield f"volume {volume['name']} may fill the node's disk; set emptyDir.sizeLimit"
    first = {each["name"] for each in pod.spec.get("initContainers", [])}
    for container in pod.containers:
        for what in _of_container(container, once=container["name"] in first):
            yield f"container {container['name']} {what}"


def _of_container(container: Manifest, once: bool) -> Iterator[str]:
    if not _PINNED.match(container.get("image", "")):
        yield f"has the image {container.get('image')!r}; name a version, and not latest"
    security = container.get("securityContext", {})
    if not security.get("readOnlyRootFilesystem"):
        yield "may write to its image; set securityContext.readOnlyRootFilesystem"
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield "may gain rights; set securityContext.allowPrivilegeEscalation false"
    if "ALL" not in security.get("capabilities", {}).get("drop", []):
        yield "has capabilities; set securityContext.capabilities.drop [ALL]"
    resources = container.get("resources", {})
    for resource in ("cpu", "memory"):
        if any(resource not in resources.get(kind, {}) for kind in ("limits", "requests")):
            yield f"has no request or limit of {resource}; set both"
    if not once:
        for probe in ("livenessProbe", "readinessProbe"):
            if probe not in container:
                yield f"has no {probe}; add one"
    for variable in container.get("env", []):
        if "value" in variable and _SECRET_NAME.search(variable["name"]):
            yield f"has {variable['name']} in the manifest; take it from a secret by valueFrom"
