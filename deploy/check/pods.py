"""The pods of a manifest, wherever they stand in it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .kubectl import Manifest

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(frozen=True)
class Pod:
    """A template of pods; `name` says whose it is. There are `replicas` of them at the start."""

    name: str
    template: Manifest
    replicas: int

    @property
    def spec(self) -> Manifest:
        return self.template.get("spec", {})

    @property
    def manifest(self) -> Manifest:
        """As a Pod of its own."""
        metadata = {"name": "pod", **self.template.get("metadata", {})}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": self.spec}

    @property
    def containers(self) -> list[Manifest]:
        """All, those that run first included."""
        return [*self.spec.get("initContainers", []), *self.spec.get("containers", [])]

    @property
    def main(self) -> Manifest:
        """The container that Ray runs in."""
        return self.spec["containers"][0]

    def limit(self, resource: str) -> float:
        """Of the main container; 0 where there is none."""
        return quantity(self.main.get("resources", {}).get("limits", {}).get(resource, 0))


def pods_of(manifest: Manifest) -> Iterator[Pod]:
    """Of a RayService or RayCluster, head first, or of what Kubernetes itself replicates."""
    spec = manifest.get("spec", {})
    match manifest.get("kind"):
        case "RayService":
            yield from _of_ray(spec["rayClusterConfig"])
        case "RayCluster":
            yield from _of_ray(spec)
        case "Deployment" | "StatefulSet" | "DaemonSet" | "Job":
            yield Pod(manifest["metadata"]["name"], spec["template"], spec.get("replicas", 1))


def _of_ray(cluster: Manifest) -> Iterator[Pod]:
    yield Pod("head", cluster["headGroupSpec"]["template"], 1)
    for group in cluster.get("workerGroupSpecs", []):
        replicas = group.get("replicas", 1) * group.get("numOfHosts", 1)
        yield Pod(f"workers {group['groupName']}", group["template"], replicas)


def quantity(value: Any) -> float:
    """What Kubernetes means by "500m", "4Gi" or 2."""
    matched = re.fullmatch(r"([0-9.]+)(m|[kMGT]i?|Ki)?", str(value))
    if matched is None:
        raise ValueError(f"{value!r} is no quantity")
    number, unit = float(matched[1]), matched[2] or ""
    return number / 1000 if unit == "m" else number * _UNITS[unit]
