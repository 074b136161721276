"""Ranks that share one GPU, over gloo with tensors on the GPU, give what one process gives there.

Their speed means nothing; the kernels, and what travels between ranks, are the real ones.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from longreach.engine.local import LocalPrefill
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.parallel.mesh import Mesh

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="ranks share a GPU")

LENGTHS = (1000, 6000)
CHUNK = 2048
THRESHOLD = 4000
"""Between both lengths: the longer one, of four dual chunks, is prefilled sparsely."""

MOST_DIFFERENCE = 2e-2
"""Of logits, relative; ranks add bfloat16 numbers in another order."""


def run_all(folder: Path, mesh: Mesh) -> list[Tensor]:
    device = torch.device("cuda")
    local = LocalPrefill(folder, max(LENGTHS), torch.bfloat16, device, mesh=mesh)
    local.pool.memory.fill_(torch.nan)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(32, 127, length).astype(np.int32) for length in LENGTHS]
    return [local.logits(prompt, CHUNK).cpu() for prompt in prompts]


def rank_main(rank: int, meshes: list[tuple[int, int]], folder: Path, output: Path) -> None:
    for tensor, sequence in meshes:
        place = f"{tensor}x{sequence}"
        mesh = Mesh.join(tensor, sequence, rank, f"file://{output}/meeting-{place}")
        torch.save(run_all(folder, mesh), output / f"{place}-{rank}.pt")
        mesh.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, with a threshold for sparse prefill that short prompts reach."""
    copy = tmp_path_factory.mktemp("pocket") / "checkpoint"
    shutil.copytree(CHECKPOINT, copy)
    config = json.loads((copy / "config.json").read_text())
    config["dual_chunk_attention_config"]["sparse_attention_threshold"] = THRESHOLD
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("meshes", [[(1, 2), (2, 1)], [(2, 2), (1, 4)]], ids=["two", "four"])
def test_ranks_on_one_gpu_are_one_process(
    meshes: list[tuple[int, int]], folder: Path, tmp_path: Path
) -> None:
    expected = run_all(folder, Mesh.single())
    ranks = meshes[0][0] * meshes[0][1]
    spawn(rank_main, (meshes, folder, tmp_path), nprocs=ranks)
    for tensor, sequence in meshes:
        for rank in range(ranks):
            actual = torch.load(tmp_path / f"{tensor}x{sequence}-{rank}.pt")
            for one, other in zip(actual, expected, strict=True):
                assert float((one - other).norm() / other.norm()) < MOST_DIFFERENCE
