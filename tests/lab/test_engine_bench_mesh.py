"""What the benchmark of meshes says of its ranks, without starting any."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.engine.errors import TensorParallelError
from longreach.engine.model.files import POCKET, ModelFiles
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.parallel.mesh import Mesh
from longreach.lab.engine_bench import mesh, mesh_rank, running
from longreach.lab.engine_bench.mesh_rank import MeshCase, RankRun
from longreach.lab.engine_bench.running import PromptRun
from longreach.lab.engine_bench.subject import KV_CACHE_TYPES, page_geometry


def case_of(tensor: int, sequence: int) -> MeshCase:
    return MeshCase(tensor, sequence, ModelFiles.of(POCKET), False, "bf16", 300, (256,), 0, "auto")


@pytest.mark.parametrize(
    ("gpus", "ranks", "efficiency"),
    [
        (2, 2, 0.8), (4, 2, 0.8), (1, 1, 1.6), (0, 1, 1.6),
        # They would take turns on one GPU, or on the cores of one machine.
        (1, 2, None), (0, 2, None),
    ],
)  # fmt: skip
def test_efficiency_is_of_ranks_with_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, gpus: int, ranks: int, efficiency: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    alone = RankRun(256, 4.0, {}, 0, 0, torch.zeros(1))
    assert mesh._efficiency(case_of(1, ranks), 2.5, alone) == efficiency
    assert mesh._efficiency(case_of(1, ranks), 2.5, None) is None


@pytest.mark.parametrize("kv_cache", KV_CACHE_TYPES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_pages_are_those_that_a_rank_needs(ranks: int, kv_cache: str) -> None:
    """The last rank of four shares its one KV head with another."""
    model = Qwen2.load(CHECKPOINT, Mesh(ranks, 1, ranks - 1), torch.bfloat16, torch.device("cpu"))
    needed = replace(model.page_geometry, dtype=KV_CACHE_TYPES[kv_cache])
    assert page_geometry(model.config, kv_cache, ranks) == needed
    with pytest.raises(TensorParallelError):
        page_geometry(model.config, kv_cache, 3)


def test_pages_are_said_in_one_place() -> None:
    """What is checked to fit, and what a rank takes, must not come to differ."""
    assert mesh.__file__ is not None
    modules = Path(mesh.__file__).parent.glob("*.py")
    making = [each.name for each in modules if "PageGeometry(" in each.read_text("utf-8")]
    assert making == ["subject.py"]


@pytest.mark.parametrize(("seconds", "times"), [(1.9, 5), (2.0, 1)])
def test_a_rank_runs_a_short_prompt_as_often_as_one_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, seconds: float, times: int
) -> None:
    nothing: Any = None
    ran: list[str] = []

    def alone(*arguments: object) -> PromptRun:
        ran.append("alone")
        return PromptRun(300, False, seconds, seconds, {}, 1.0, [], None, None)

    def of_rank(*arguments: object) -> RankRun:
        ran.append("rank")
        return RankRun(256, seconds, {}, 0, 0, torch.zeros(1))

    monkeypatch.setattr(running, "_SHORT_SECONDS", 2.0)
    monkeypatch.setattr(running, "_REPEATS", 5)
    monkeypatch.setattr(running, "_run_once", alone)
    monkeypatch.setattr(mesh_rank, "_run", of_rank)
    running.run_prompt(nothing, 300, False, 0)
    mesh_rank._median_run(nothing, Mesh.single(), case_of(1, 1), 256, torch.device("cpu"))
    assert ran == ["alone"] * times + ["rank"] * times


def test_a_meshes_median_is_one_run_whatever_a_rank_took_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its own clock this rank would choose the second run, and another rank another one."""
    nothing: Any = None
    of_this_rank = [RankRun(256, each, {}, 0, 0, torch.zeros(1)) for each in (0.1, 0.2, 0.3)]
    means = {0.1: 0.5, 0.2: 0.7, 0.3: 0.6}
    runs = iter(of_this_rank)
    monkeypatch.setattr(mesh_rank, "_run", lambda *_: next(runs))
    monkeypatch.setattr(mesh_rank, "_mean", lambda _mesh, seconds, _device: means[seconds])
    monkeypatch.setattr(running, "_REPEATS", 3)
    chosen = mesh_rank._median_run(nothing, Mesh.single(), case_of(1, 1), 256, torch.device("cpu"))
    assert chosen is of_this_rank[2]
