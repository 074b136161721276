"""What the benchmark of meshes says of its ranks, without starting any."""

import pytest
import torch

from longreach.engine.model.files import POCKET, ModelFiles
from longreach.lab.engine_bench import mesh
from longreach.lab.engine_bench.mesh_rank import MeshCase, RankRun


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
