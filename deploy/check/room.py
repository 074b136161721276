"""Whether a cluster's processes find room in the pods: GPUs, CPUs and memory."""

from collections.abc import Iterator, Mapping, Sequence

from ...cluster.cli.explain import kv_bytes
from ...cluster.memory import decode_fit, prefill_fit
from ...cluster.settings import GangSettings, Settings
from ...engine.memory.fit import Fit, Weights
from ...engine.model.config import ModelConfig
from .pods import Pod

GPU = "nvidia.com/gpu"
PRODUCT = "nvidia.com/gpu.product"
GPU_BYTES = {"NVIDIA-H100-80GB-HBM3": 84e9, "NVIDIA-H200": 149e9}
"""What a process finds free on each, the driver's own taken off."""
_HOST_BYTES = 0.4 * 2**30
"""Of a process with torch and Ray in it, on the host."""
_RAY_BYTES = 2**30
"""Of a pod's raylet, agents, proxy and object store's records."""


def problems(
    settings: Settings, workers: Sequence[Pod], replica_cpus: Mapping[str, float]
) -> Iterator[str]:
    """What would wait for room forever, or run out of memory.

    Args:
        replica_cpus: what a replica of each of Serve's deployments asks for.
    """
    gpus = [pod.limit(GPU) for pod in workers for _ in range(pod.replicas)]
    asked = sum(_gang_gpus(gang) * gang.prefill.replicas for gang in settings.gangs)
    asked += settings.decode.replicas * _worker_gpus(settings)
    if asked > sum(gpus):
        yield (
            f"ranks and decode workers ask for {asked:g} GPUs and the pods have {sum(gpus):g}; "
            f"raise replicas or {GPU} of workerGroupSpecs, or lower sequence_parallel or replicas"
        )
    elif asked < sum(gpus):
        yield (
            f"the pods have {sum(gpus):g} GPUs and {asked:g} are asked for, so that "
            f"{sum(gpus) - asked:g} would idle; raise decode.replicas or sequence_parallel, or "
            f"lower {GPU}"
        )
    else:
        yield from _placing(settings, gpus)
    yield from _parts(settings)
    yield from _cpus(settings, workers, replica_cpus)
    for pod in workers:
        yield from _gpu_memory(settings, pod) if pod.limit(GPU) else _host_memory(settings, pod)


def _gang_gpus(gang: GangSettings) -> float:
    return gang.prefill.num_ranks * gang.prefill.gpus_per_rank


def _worker_gpus(settings: Settings) -> float:
    """Of all ranks of one decode worker, which are in one pod."""
    return settings.decode.tensor_parallel * settings.decode.gpus


def _placing(settings: Settings, gpus: Sequence[float]) -> Iterator[str]:
    """Gangs in one pod each where they must be, everything else rank by rank."""
    free = list(gpus)
    for gang in sorted(settings.gangs, key=_gang_gpus, reverse=True):
        prefill = gang.prefill
        pieces = [prefill.gpus_per_rank] * prefill.num_ranks
        if prefill.placement == "STRICT_PACK":
            pieces = [sum(pieces)]
        for piece in pieces * prefill.replicas:
            if not _take(free, piece):
                yield (
                    f"{piece:g} GPUs of a gang are in no pod together ({max(gpus, default=0):g} at "
                    f"most); lower {prefill.key('sequence_parallel')}, or set placement: PACK "
                    "and transport.kind: nixl"
                )
                return
    for _ in range(settings.decode.replicas):
        if not _take(free, _worker_gpus(settings)):
            yield (
                f"no pod has {_worker_gpus(settings):g} GPUs left for a decode worker beside the "
                "gangs; divide GPUs otherwise between prefill and decode"
            )
            return


def _take(free: list[float], amount: float) -> bool:
    """From the fullest pod with room, as Ray does."""
    fitting = [at for at, left in enumerate(free) if left + 1e-9 >= amount]
    if not fitting:
        return False
    free[min(fitting, key=free.__getitem__)] -= amount
    return True


def _parts(settings: Settings) -> Iterator[str]:
    """Parts of a GPU must make up whole ones."""
    parts = {gang.key("gpus_per_rank"): gang.gpus_per_rank for gang in settings.prefill}
    parts["decode.gpus"] = settings.decode.gpus
    for key, part in parts.items():
        if 0 < part < 1 and abs(1 / part - round(1 / part)) > 1e-6:
            yield f"{key} ({part:g}) does not divide a GPU; take a half, a third or a quarter"
        if part > 1 and part != int(part):
            yield f"{key} ({part:g}) is no number of whole GPUs; take {int(part)}"


def _cpus(
    settings: Settings, workers: Sequence[Pod], replica_cpus: Mapping[str, float]
) -> Iterator[str]:
    worker = settings.decode.tensor_parallel * settings.decode.cpus
    asked = settings.decode.replicas * (worker + replica_cpus.get("decode", 0))
    asked += settings.ingress.replicas * replica_cpus.get("ingress", 0)
    for gang in settings.gangs:
        prefill = gang.prefill
        name = f"prefill-{prefill.name}" if len(settings.prefill) > 1 else "prefill"
        ranks = prefill.num_ranks * prefill.cpus_per_rank
        asked += prefill.replicas * (ranks + replica_cpus.get(name, 0))
    has = sum(pod.limit("cpu") * pod.replicas for pod in workers)
    if asked > has:
        yield (
            f"processes ask for {asked:g} CPUs and the pods have {has:g}; raise the limits of "
            "workerGroupSpecs, or lower cpus_per_rank, decode.cpus or num_cpus"
        )


def _gpu_memory(settings: Settings, pod: Pod) -> Iterator[str]:
    product = pod.spec.get("nodeSelector", {}).get(PRODUCT, "")
    if product not in GPU_BYTES:
        yield (
            f"{pod.name}: the memory of a GPU {product!r} is not known; set nodeSelector "
            f"{PRODUCT} to one of {', '.join(GPU_BYTES)}, or add it to deploy/check/room.py"
        )
        return
    free = GPU_BYTES[product]
    worker = _bytes(decode_fit(settings.worker, int(free)), settings.decode.kv_cache_tokens)
    for gang in settings.gangs:
        fit, longest = prefill_fit(gang, int(free), 1), gang.max_prompt_tokens
        rank = _bytes(fit, gang.prefill.kv_cache_tokens, longest)
        together = gang.prefill.gpus_per_rank + settings.decode.gpus <= 1
        needed = rank + worker if together else max(rank, worker)
        if needed > free:
            yield (
                f"{pod.name}: {needed / 1e9:.1f} GB of weights, KV pages and computing do not fit "
                f"the {free / 1e9:.0f} GB of a {product}; lower "
                f"{gang.prefill.key('kv_cache_tokens')}, decode.kv_cache_tokens or chunk_tokens"
            )


def _bytes(fit: Fit, tokens: int, longest: int | None = None) -> int:
    needs = fit.needs(tokens, longest)
    return needs.weight_bytes + needs.cache_bytes + needs.computing_bytes


def _host_memory(settings: Settings, pod: Pod) -> Iterator[str]:
    """Of a pod without GPUs, which holds everything."""
    model = ModelConfig.from_folder(settings.model.folder)
    weights = Weights(model, 4).num_bytes + _HOST_BYTES
    needed = _RAY_BYTES + settings.ingress.replicas * _HOST_BYTES
    decode = kv_bytes(settings, model, settings.decode.kv_cache_tokens)
    decode += settings.decode.tensor_parallel * weights
    needed += settings.decode.replicas * decode
    for gang in settings.prefill:
        rank = kv_bytes(settings, model, gang.kv_cache_tokens) // gang.tensor_parallel + weights
        needed += gang.replicas * gang.num_ranks * rank
    if needed > pod.replicas * pod.limit("memory"):
        yield (
            f"{pod.name}: {needed / 2**30:.1f} GiB of weights, KV pages and processes do not fit "
            f"the {pod.replicas * pod.limit('memory') / 2**30:.1f} GiB of its pods; lower "
            "prefill.kv_cache_tokens or decode.kv_cache_tokens, or raise the limit of memory"
        )
