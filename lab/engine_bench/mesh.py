"""Real meshes, one after the other: processes over NCCL where each has a GPU, over gloo elsewhere.

Every mesh computes the same prompt. How well it does is said against the first of them on one GPU,
in the same run, and so are its logits.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from ...engine.errors import GB, ConfigurationError
from ...engine.memory.fit import PrefillFit, Weights, free_bytes
from ...engine.model.config import ModelConfig
from ...engine.prefill.sparsity import SparsityConfig
from ..csv_lines import append
from .environment import Environment
from .mesh_rank import MeshCase, RankRun, read_runs, run_rank
from .options import Options
from .subject import page_geometry

_STAGES = (
    "linear", "attention", "selection", "communication", "elementwise", "page writes",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One mesh and size of chunks, measured. Seconds, unless the name says otherwise.

    `mesh` is tensor × sequence parallel. Stages are those of the rank that computes for longest,
    and of the one that does for shortest; `communication` is what nothing hides. `efficiency` is
    one GPU's time by that of all GPUs together. It is None before there is a run of one rank, and
    where several ranks share a GPU, or a machine's cores: they take turns, which says nothing of
    as many GPUs. `communicators_gb` is not PyTorch's memory.
    """

    model: str
    mesh: str
    tokens: int
    attention: str
    weights: str
    kv_cache: str
    chunk_tokens: int
    ttft: float
    efficiency: float | None
    slowest_linear: float
    slowest_attention: float
    slowest_selection: float
    slowest_communication: float
    slowest_elementwise: float
    slowest_page_writes: float
    slowest_gaps: float
    fastest_linear: float
    fastest_attention: float
    fastest_selection: float
    fastest_communication: float
    fastest_elementwise: float
    fastest_page_writes: float
    fastest_gaps: float
    logits_difference: float | None
    logits_equal: bool | None
    peak_gb: float
    communicators_gb: float
    backend: str
    gpus: int
    environment: Environment

    def text(self) -> str:
        """A row of the table."""
        efficiency = "     -" if self.efficiency is None else f"{self.efficiency:6.3f}"
        logits = "-"
        if self.logits_difference is not None:
            logits = "equal" if self.logits_equal else f"{self.logits_difference:.1e}"
        stages = "".join(f"{getattr(self, _column('slowest', name)):8.3f}" for name in _STAGES)
        waits = f"{self.fastest_communication:8.3f}"
        return (
            f"{self.mesh:5}{self.chunk_tokens:9,}{self.ttft:9.3f}{efficiency}{stages}"
            f"{self.slowest_gaps:8.3f}{waits}{self.peak_gb:8.2f}{self.communicators_gb:7.2f}  "
            f"{logits}"
        )


_HEADER = (
    "mesh    chunk     TTFT   eff.  linear  attent.  select.  communi. element.   pages    gaps"
    "  (fastest: comm.)  peak GB, communicators GB, logits"
)


def measure(options: Options) -> None:
    """Print and keep a line for every mesh and size of chunks.

    Raises:
        ConfigurationError: a mesh has more ranks than there are GPUs.
        DoesNotFitError: a prompt does not fit; nothing was run.
    """
    cases = [_case(options, *mesh) for mesh in options.meshes]
    for case in cases:
        _check(options, case)
    print(
        f"{options.name}, weights {options.weights}, {options.tokens[-1]:,} tokens, pages "
        f"{options.kv_cache}; stages in seconds of the slowest rank\n{_HEADER}"
    )
    alone: RankRun | None = None
    for case in cases:
        for ranks in _run(case):
            line = _line(options, case, ranks, alone)
            print(line.text(), flush=True)
            append(options.csv, [line])
            if alone is None and case.num_ranks == 1:
                alone = ranks[0]


def _case(options: Options, tensor: int, sequence: int) -> MeshCase:
    sizes = list(options.chunks)
    if options.rank_tokens is not None:
        sizes.append(options.rank_tokens * sequence)
    return MeshCase(
        tensor, sequence, options.files, "sparse" in options.attentions, options.kv_cache,
        options.tokens[-1], tuple(dict.fromkeys(sizes)), options.seed, options.kept,
    )  # fmt: skip


def _check(options: Options, case: MeshCase) -> None:
    """Refuse what cannot run before anything does."""
    config = ModelConfig.from_folder(options.files.folder)
    weights = Weights(config, torch.bfloat16.itemsize, case.tensor_parallel, case.kept)
    geometry = page_geometry(config, case.kv_cache, case.tensor_parallel)
    sparsity = SparsityConfig.from_folder(options.files.folder) if case.sparse else None
    if not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    if 1 < count < case.num_ranks:
        raise ConfigurationError(
            f"a mesh of {case.tensor_parallel} × {case.sequence_parallel} needs {case.num_ranks} "
            f"GPUs, and there are {count}; name smaller ones with --meshes"
        )
    fit = PrefillFit(
        weights, geometry, free_bytes(torch.device("cuda")), max(case.chunk_tokens),
        case.sequence_parallel,
        selects_above=None if sparsity is None else sparsity.threshold,
        processes=case.num_ranks if count < case.num_ranks else 1,
    )  # fmt: skip
    fit.check(case.tokens)


def _run(case: MeshCase) -> list[list[RankRun]]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(run_rank, (case, Path(folder)), nprocs=case.num_ranks)
        return read_runs(case, Path(folder))


def _line(
    options: Options, case: MeshCase, ranks: Sequence[RankRun], alone: RankRun | None
) -> Line:
    busy = sorted(ranks, key=_busy_seconds)
    ttft = max(run.seconds for run in ranks)
    return Line(
        model=options.name,
        mesh=f"{case.tensor_parallel}x{case.sequence_parallel}",
        tokens=case.tokens,
        attention="sparse" if case.sparse else "dense",
        weights=options.weights,
        kv_cache=case.kv_cache,
        chunk_tokens=ranks[0].chunk_tokens,
        ttft=ttft,
        efficiency=_efficiency(case, ttft, alone),
        **_stages("slowest", busy[-1]),
        **_stages("fastest", busy[0]),
        logits_difference=None if alone is None else _difference(ranks[0].logits, alone.logits),
        logits_equal=None if alone is None else torch.equal(ranks[0].logits, alone.logits),
        peak_gb=max(run.peak_bytes for run in ranks) / GB,
        communicators_gb=max(run.communicator_bytes for run in ranks) / GB,
        backend="none" if case.num_ranks == 1 else "nccl" if case.apart else "gloo",
        gpus=case.num_ranks if case.apart else int(torch.cuda.is_available()),
        environment=Environment.of_this_run(options.commit),
    )


def _efficiency(case: MeshCase, ttft: float, alone: RankRun | None) -> float | None:
    if alone is None or (case.num_ranks > 1 and not case.apart):
        return None
    return alone.seconds / ttft / case.num_ranks


def _stages(which: str, run: RankRun) -> dict[str, float]:
    found = {_column(which, name): run.stages.get(name, 0.0) for name in _STAGES}
    return {**found, f"{which}_gaps": run.seconds - sum(run.stages.values())}


def _column(which: str, stage: str) -> str:
    return f"{which}_{stage.replace(' ', '_')}"


def _busy_seconds(run: RankRun) -> float:
    """Without what it waited for others."""
    return sum(seconds for stage, seconds in run.stages.items() if stage != "communication")


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative, over all tokens that are some."""
    real = theirs > -torch.inf
    return float((ours[real] - theirs[real]).norm() / theirs[real].norm())
