"""Whether manifests have the fields that their kinds have, and no others.

Core kinds are checked by Kubernetes' own schemas. Custom resources are checked by small schemas of
just the fields that are used here, and by those of their CRDs where these are at hand.
"""

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator

from .kubectl import Manifest, name_of
from .pods import pods_of
from .problems import Problem

KUBERNETES = "1.36"
"""The version whose schemas core kinds are checked by; kubectl's."""
OURS = Path(__file__).parent / "schemas"


def problems(manifests: Iterable[Manifest], crds: Path | None) -> Iterator[Problem]:
    """Args: crds: a folder of files with `kind` and `openAPIV3Schema`; None: none at hand."""
    for manifest in manifests:
        group = manifest.get("apiVersion", "").partition("/")[0]
        if ("." in group and not group.endswith(".k8s.io")) or group.startswith("gateway."):
            yield from _custom(manifest, crds)
        else:
            yield from _core(manifest)
        # A pod within a custom resource is an object to its schema.
        if group == "ray.io":
            for pod in pods_of(manifest):
                yield from _core(pod.manifest, f"{name_of(manifest)}, {pod.name}")


def _core(manifest: Manifest, where: str | None = None) -> Iterator[Problem]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        path = ".".join(str(part) for part in error.path)
        yield Problem(where or name_of(manifest), f"{path}: {error.message}; correct it")
    except kubernetes_validate.SchemaNotFoundError:
        yield Problem(
            where or name_of(manifest),
            f"{manifest.get('apiVersion')} {manifest.get('kind')} is no kind of Kubernetes "
            f"{KUBERNETES}; correct it, or add a schema to deploy/check/schemas",
        )


def _custom(manifest: Manifest, crds: Path | None) -> Iterator[Problem]:
    kind = manifest.get("kind", "")
    ours = _schemas(OURS)
    if kind not in ours:
        yield Problem(name_of(manifest), f"no schema of {kind}; add one to deploy/check/schemas")
        return
    for schema in (ours[kind], *([] if crds is None else [_schemas(crds).get(kind)])):
        if schema is not None:
            yield from _violations(manifest, schema)


def _violations(manifest: Manifest, schema: dict[str, Any]) -> Iterator[Problem]:
    for error in Draft202012Validator(schema).iter_errors(manifest):
        path = ".".join(str(part) for part in error.absolute_path) or "the object"
        yield Problem(name_of(manifest), f"{path}: {error.message[:300]}; correct it")


@cache
def _schemas(folder: Path) -> dict[str, dict[str, Any]]:
    """By kind; unknown keys are refused in depth."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        crd = json.loads(path.read_text(encoding="utf-8"))
        found[crd["kind"]] = closed(crd["openAPIV3Schema"])
    return found


def closed(schema: Any) -> Any:
    """A schema by which objects have no keys but those that it names."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made
