"""What cannot run is refused, with the remedy, before anybody applies it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from longreach.deploy.check import images, policies, schemas, serving
from longreach.deploy.check.pods import quantity

DEPLOY = Path(__file__).parents[2] / "deploy"
CRDS = DEPLOY.parents[1] / "shared" / "data" / "crds"
GIB = 2**30


def service(overlay: str, **main: Any) -> dict[str, Any]:
    """The base's RayService with an overlay's serve.yaml, and of its workers' Ray some fields."""
    made = yaml.safe_load((DEPLOY / "k8s" / "base" / "ray-service.yaml").read_text())
    # Each part by itself: in the file some stand for each other.
    made = copy.deepcopy(yaml.safe_load(yaml.safe_dump(made, default_flow_style=False)))
    served = (DEPLOY / "k8s" / "overlays" / overlay / "serve.yaml").read_text()
    made["spec"]["serveConfigV2"] = served
    for pod in (head_of(made), workers_of(made)["template"]):
        for container in pod["spec"]["containers"]:
            container["image"] = "longreach:0.2.0"
    ray_of(made).update(main)
    return made


def head_of(made: dict[str, Any]) -> dict[str, Any]:
    return made["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]


def workers_of(made: dict[str, Any]) -> dict[str, Any]:
    return made["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]


def ray_of(made: dict[str, Any]) -> dict[str, Any]:
    return workers_of(made)["template"]["spec"]["containers"][0]


def on_cpus() -> dict[str, Any]:
    sizes = {"cpu": "2", "memory": "5Gi"}
    return service("laptop", resources={"requests": sizes, "limits": sizes})


def on_gpus(overlay: str, gpus: int, product: str, replicas: int = 1) -> dict[str, Any]:
    sizes = {"cpu": "32", "memory": "320Gi", "nvidia.com/gpu": gpus}
    made = service(overlay, resources={"requests": sizes, "limits": sizes})
    workers_of(made)["replicas"] = replicas
    workers_of(made)["template"]["spec"]["nodeSelector"] = {"nvidia.com/gpu.product": product}
    return made


def eight() -> dict[str, Any]:
    return on_gpus("eight-gpus", 8, "NVIDIA-H100-80GB-HBM3")


def configured(made: dict[str, Any], section: str, **values: Any) -> dict[str, Any]:
    """With other values in the cluster's configuration."""
    config = serving.serve_config(made)
    serving.cluster_config(config)[section].update(values)
    made["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    return made


def found(made: dict[str, Any]) -> list[str]:
    kinds = (serving.problems([made]), policies.problems([made]), schemas.problems([made], None))
    return [str(problem) for kind in kinds for problem in kind]


@pytest.mark.parametrize(
    "made",
    [
        on_cpus(),
        eight(),
        on_gpus("one-gpu", 1, "NVIDIA-H200"),
        on_gpus("multi-node", 8, "NVIDIA-H100-80GB-HBM3", replicas=3),
    ],
)
def test_what_is_deployed_is_accepted(made: dict[str, Any]) -> None:
    assert found(made) == []


@pytest.mark.parametrize(
    ("made", "remedy"),
    [
        # GPUs that do not divide.
        (configured(eight(), "prefill", sequence_parallel=7), "sequence_parallel"),
        (configured(eight(), "prefill", sequence_parallel=5), "would idle"),
        (configured(eight(), "decode", tensor_parallel=2), "lower sequence_parallel"),
        (configured(eight(), "prefill", sequence_parallel=1, tensor_parallel=6), "tensor_parallel"),
        (configured(on_gpus("one-gpu", 1, "NVIDIA-H200"), "decode", gpus=0.4), "a half"),
        (on_gpus("eight-gpus", 4, "NVIDIA-H100-80GB-HBM3", replicas=2), "placement: PACK"),
        # Pools that do not fit.
        (configured(eight(), "prefill", kv_cache_tokens=3_000_000), "prefill.kv_cache_tokens"),
        (configured(eight(), "decode", kv_cache_tokens=4_000_000), "decode.kv_cache_tokens"),
        (configured(on_cpus(), "decode", kv_cache_tokens=1_000_000), "decode.kv_cache_tokens"),
        (configured(on_cpus(), "prefill", kv_cache_tokens=1024), "limits.max_model_len"),
        (on_gpus("one-gpu", 1, "NVIDIA-T4"), "NVIDIA-H200"),
        # An end that cuts off what is under way.
        (configured(on_cpus(), "shutdown", drain_seconds=640.0), "terminationGracePeriodSeconds"),
        (configured(on_cpus(), "shutdown", drain_seconds=640.0), "rayClusterDeletionDelaySeconds"),
        (configured(on_cpus(), "shutdown", hand_over_seconds=1261.0), "make it 1891 or more"),
        (configured(on_cpus(), "shutdown", hand_over_seconds=500.0), "--seconds=1100"),
        # What is said twice, and otherwise.
        (configured(on_cpus(), "limits", max_body_bytes=1 << 20), "LONGREACH_FRONT_LIMITS"),
        (configured(on_cpus(), "ingress", port=8001), "http_options"),
        (configured(on_cpus(), "ingress", api_keys_file=None), "api_keys_file"),
        (configured(on_cpus(), "metrics", directory="/elsewhere"), "exporter"),
        (configured(on_cpus(), "decode", cpus=2), "CPUs"),
    ],
)
def test_settings_that_cannot_run_are_refused(made: dict[str, Any], remedy: str) -> None:
    problems = found(made)
    assert any(remedy in problem for problem in problems), problems


Change = Callable[[dict[str, Any]], object]
PODS: dict[str, Change] = {
    "runAsNonRoot": lambda made: head_of(made)["spec"].update(securityContext={}),
    "limit of memory": lambda made: ray_of(made)["resources"]["limits"].pop("memory"),
    "readinessProbe": lambda made: ray_of(made).pop("readinessProbe"),
    "livenessProbe": lambda made: ray_of(made).pop("livenessProbe"),
    "not latest": lambda made: ray_of(made).update(image="longreach:latest"),
    "name a version": lambda made: ray_of(made).update(image="longreach"),
    "readOnlyRootFilesystem": lambda made: ray_of(made)["securityContext"].pop(
        "readOnlyRootFilesystem"
    ),
    "[ALL]": lambda made: ray_of(made)["securityContext"].pop("capabilities"),
    "allowPrivilegeEscalation": lambda made: ray_of(made)["securityContext"].update(
        privileged=True
    ),
    "valueFrom": lambda made: ray_of(made)["env"].append({"name": "API_KEY", "value": "sk-1"}),
    "sizeLimit": lambda made: workers_of(made)["template"]["spec"]["volumes"][0].update(
        emptyDir={}
    ),
    "longreach drain": lambda made: ray_of(made).pop("lifecycle"),
    "no volume": lambda made: ray_of(made)["volumeMounts"].pop(),
    "correct it": lambda made: ray_of(made).update(volumeMount=[]),
    "rayVersions": lambda made: made["spec"]["rayClusterConfig"].update(rayVersions="2"),
    "import_path": lambda made: made["spec"].update(
        serveConfigV2="applications: [{name: a, import_path: 'b:c'}]"
    ),
}


@pytest.mark.parametrize("said", PODS)
def test_pods_that_break_a_rule_are_refused(said: str) -> None:
    made = on_cpus()
    PODS[said](made)
    problems = found(made)
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("budget", "accepted"),
    [
        ({"minAvailable": 1}, True),
        ({"minAvailable": 2}, False),  # nothing could ever be drained
        ({"minAvailable": "50%"}, False),  # of pods that have a controller alone
        ({"maxUnavailable": 1}, False),
    ],
)
def test_one_pod_goes_at_a_time(budget: dict[str, Any], accepted: bool) -> None:
    made = on_cpus()
    selector = {"matchLabels": {"app.kubernetes.io/name": "longreach"}}
    spec = {"kind": "PodDisruptionBudget", "spec": {**budget, "selector": selector}}
    assert (list(policies.problems([made, spec])) == []) is accepted


def test_secrets_are_in_no_manifest() -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}}
    assert [str(each) for each in policies.problems([secret])]


def test_typing_errors_are_found_by_the_schemas_of_the_crds() -> None:
    if not CRDS.is_dir():
        pytest.skip(f"no schemas of custom resources at {CRDS}")
    made = on_cpus()
    assert list(schemas.problems([made], CRDS)) == []
    made["spec"]["rayClusterConfig"]["headGroupSpec"]["serviceTyp"] = "ClusterIP"
    by_ours = len(list(schemas.problems([made], None)))
    assert len(list(schemas.problems([made], CRDS))) == 2 * by_ours == 2


@pytest.mark.parametrize(
    ("written", "meant"), [("500m", 0.5), ("4Gi", 4 * GIB), (2, 2), ("1.5G", 1.5e9), ("3", 3)]
)
def test_quantities_are_kubernetes_own(written: str | int, meant: float) -> None:
    assert quantity(written) == meant


DOCKERFILE = (DEPLOY / "images" / "cpu.Dockerfile").read_text()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("USER 1000:1000", "USER root", "root"),
        ("USER 1000:1000\n", "", "root"),
        ("python:3.11.14-slim-bookworm AS build", "python AS build", "version"),
        ('ENTRYPOINT ["longreach"]', 'ENTRYPOINT ["bash"]', "longreach"),
    ],
)
def test_images_that_break_a_rule_are_refused(
    tmp_path: Path, before: str, after: str, said: str
) -> None:
    path = tmp_path / "one.Dockerfile"
    path.write_text(DOCKERFILE)
    assert list(images.problems(tmp_path)) == []
    path.write_text(DOCKERFILE.replace(before, after))
    assert any(said in problem.what for problem in images.problems(tmp_path))
