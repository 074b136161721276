"""One rank of a real mesh: a process of its own, which computes a prompt and says how it went."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...engine.kv.pages import PagePool
from ...engine.model.config import WeightFormat
from ...engine.model.files import ModelFiles
from ...engine.model.load import load_model
from ...engine.parallel.mesh import Mesh
from ...engine.prefill.prefiller import Prefiller
from ...engine.prefill.sparsity import SparsityConfig
from ...engine.prefill.warm_up import warm_up_prefill
from ...kernels.page_size import pages_for
from .running import add_up, prefill, repeated
from .subject import page_geometry, random_prompt, synchronize


@dataclass(frozen=True)
class MeshCase:
    """A prompt on one mesh, in chunks of several sizes, one after the other."""

    tensor_parallel: int
    sequence_parallel: int
    files: ModelFiles
    sparse: bool
    kv_cache: str
    tokens: int
    chunk_tokens: tuple[int, ...]
    seed: int
    kept: WeightFormat

    @property
    def num_ranks(self) -> int:
        """Processes, and GPUs where there are any."""
        return self.tensor_parallel * self.sequence_parallel

    @property
    def apart(self) -> bool:
        """Whether every rank has a GPU to itself; else they share one, or a machine's cores."""
        return torch.cuda.is_available() and torch.cuda.device_count() >= self.num_ranks


@dataclass(frozen=True)
class RankRun:
    """What one rank saw of the median run with one size of chunks; memory is 0 on a CPU.

    `seconds` are until the logits lay on the host. `communicator_bytes`: what the device has less
    after the mesh's communicators were made than before.
    """

    chunk_tokens: int
    seconds: float
    stages: dict[str, float]
    peak_bytes: int
    communicator_bytes: int
    logits: Tensor


def run_rank(rank: int, case: MeshCase, folder: Path) -> None:
    """Meet in the folder, compute, and leave the runs there as `rank-N.pt`."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank if case.apart else 0) if on_gpu else torch.device("cpu")
    # As in a cluster, where the host has as much to do for each rank.
    torch.set_num_threads(1)
    if on_gpu:
        torch.cuda.set_device(device)
    mesh = Mesh.join(
        case.tensor_parallel, case.sequence_parallel, rank, f"file://{folder}/meeting",
        # NCCL refuses two ranks on one GPU.
        backend="nccl" if case.apart else "gloo",
    )  # fmt: skip
    communicators = _communicator_bytes(mesh, device)
    model = load_model(case.files, mesh, torch.bfloat16, device, case.seed, case.kept)
    geometry = page_geometry(model.config, case.kv_cache, case.tensor_parallel)
    pool = PagePool(geometry, pages_for(case.tokens), device)
    pool.clear()
    sparsity = SparsityConfig.from_folder(case.files.folder) if case.sparse else None
    if on_gpu:
        torch.cuda.empty_cache()
    prefiller = Prefiller(model, pool, sparsity)
    runs = []
    for chunk_tokens in case.chunk_tokens:
        warm_up_prefill(prefiller, case.tokens, chunk_tokens, model.positions.stride)
        run = _median_run(prefiller, mesh, case, chunk_tokens, device)
        runs.append({**vars(run), "communicator_bytes": communicators})
    torch.save(runs, folder / f"rank-{rank}.pt")
    mesh.close()


def read_runs(case: MeshCase, folder: Path) -> list[list[RankRun]]:
    """For each size of chunks, the runs of all ranks."""
    ranks: list[Sequence[dict]] = [
        torch.load(folder / f"rank-{rank}.pt") for rank in range(case.num_ranks)
    ]
    return [[RankRun(**run) for run in runs] for runs in zip(*ranks, strict=True)]


def _median_run(
    prefiller: Prefiller, mesh: Mesh, case: MeshCase, chunk_tokens: int, device: torch.device
) -> RankRun:
    """The same run on all ranks, by what they agree on: one that ran once more would wait."""

    def seconds(run: RankRun) -> float:
        return _mean(mesh, run.seconds, device)

    runs = repeated(lambda: _run(prefiller, mesh, case, chunk_tokens, device), seconds)
    return sorted(runs, key=seconds)[len(runs) // 2]


def _run(
    prefiller: Prefiller, mesh: Mesh, case: MeshCase, chunk_tokens: int, device: torch.device
) -> RankRun:
    prompt = random_prompt(case.files, case.tokens, case.seed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _mean(mesh, 0.0, device)
    synchronize(device)
    started = time.perf_counter()
    results = prefill(prefiller, prompt, chunk_tokens)
    logits = results[-1].logits
    assert logits is not None
    logits = logits.cpu()
    synchronize(device)
    seconds = time.perf_counter() - started
    prefiller.release("a")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return RankRun(chunk_tokens, seconds, add_up(results), peak, 0, logits)


def _mean(mesh: Mesh, seconds: float, device: torch.device) -> float:
    """The mean of what all ranks have, on each: they are together then, and decide alike."""
    mean = mesh.sum_over_tensor_ranks(torch.tensor([seconds], device=device))
    mean = mesh.sum_over_sequence_ranks(mean)
    return float(mean) / (mesh.tensor_parallel * mesh.sequence_parallel)


def _communicator_bytes(mesh: Mesh, device: torch.device) -> int:
    """Communicators are made by their first collective, and take what is not PyTorch's."""
    if device.type != "cuda":
        return 0
    synchronize(device)
    part = torch.ones(2**20, device=device)
    before = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    mesh.gather_over_sequence_ranks(part)
    mesh.gather_over_tensor_ranks(part)
    mesh.sum_over_tensor_ranks(mesh.sum_over_sequence_ranks(part))
    synchronize(device)
    after = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return before - after
