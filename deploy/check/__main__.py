"""Checks everything below deploy/; ends with status 1 where something is wrong."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from . import images, policies, rules, schemas, serving
from .kubectl import BuildError, Kubectl, overlays, unpacked, unused_components, with_component
from .problems import Problem

DEPLOY = Path(__file__).resolve().parents[1]
CRDS = DEPLOY.parents[1] / "shared" / "data" / "crds"
"""Beside a clone of this repository, where there is such a folder."""


def main() -> int:
    """What is checked and how long that took, and every problem."""
    parser = argparse.ArgumentParser(prog="python -m longreach.deploy.check", description=__doc__)
    parser.add_argument("--tools", type=Path, required=True, help="where kubectl's package is")
    parser.add_argument("--crds", type=Path, default=CRDS, help="a folder of CRDs' schemas")
    arguments = parser.parse_args()
    crds = arguments.crds if arguments.crds.is_dir() else None
    if crds is None:
        print(f"no {arguments.crds}: custom resources are checked by our own schemas alone")
    kubectl = Kubectl(unpacked(arguments.tools))
    checks: dict[str, Callable[[], Iterator[Problem]]] = {
        f"overlay {folder.name}": lambda folder=folder: overlay_problems(kubectl, folder, crds)
        for folder in overlays(DEPLOY / "k8s")
    }
    checks |= {
        f"component {folder.name}": lambda folder=folder: component_problems(kubectl, folder, crds)
        for folder in unused_components(DEPLOY / "k8s")
    }
    monitoring = DEPLOY / "k8s" / "components" / "monitoring"
    checks["alerts"] = lambda: rules.problems(
        DEPLOY / "monitoring", monitoring / "prometheus-rule.yaml"
    )
    checks["images"] = lambda: images.problems(DEPLOY / "images")
    return 1 if sum(_said(name, check) for name, check in checks.items()) else 0


def overlay_problems(kubectl: Kubectl, folder: Path, crds: Path | None) -> Iterator[Problem]:
    """Everything that is wrong with an overlay, as kustomize builds it."""
    try:
        manifests = kubectl.build(folder)
    except BuildError as error:
        yield Problem(folder.name, str(error))
        return
    yield from schemas.problems(manifests, crds)
    yield from policies.problems(manifests)
    yield from serving.problems(manifests)


def component_problems(kubectl: Kubectl, component: Path, crds: Path | None) -> Iterator[Problem]:
    """As `overlay_problems`, of the smallest overlay for GPUs with this component."""
    with with_component(DEPLOY / "k8s" / "overlays" / "one-gpu", component) as folder:
        yield from overlay_problems(kubectl, folder, crds)


def _said(name: str, check: Callable[[], Iterator[Problem]]) -> int:
    began = time.monotonic()
    found = list(check())
    verdict = f"{len(found)} wrong" if found else "ok"
    print(f"{name}: {verdict}, {time.monotonic() - began:.1f} s")
    for problem in found:
        print(f"  {problem}")
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
