"""As `test_leaving`, over NCCL: whoever waits for a rank that died waits on its GPU."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from longreach.engine.local import LocalPrefill
from longreach.engine.model.pocket import CHECKPOINT

from .test_leaving import Case, run

CHUNK = 1024
MOST_DIFFERENCE = 2e-2
"""Of logits, relative; ranks add bfloat16 numbers in another order."""


@pytest.mark.parametrize("mesh", [(1, 2), (1, 4), (2, 2)])
def test_a_prompt_goes_on_over_nccl(mesh: tuple[int, int], tmp_path: Path) -> None:
    if torch.cuda.device_count() < mesh[0] * mesh[1]:
        pytest.skip("there are too few GPUs")
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text())
    config["dual_chunk_attention_config"]["sparse_attention_threshold"] = 4000
    (folder / "config.json").write_text(json.dumps(config))
    case = Case(mesh, signal.SIGKILL, "auto", folder, CHUNK, on_gpus=True)
    alone = LocalPrefill(folder, 6 * CHUNK, torch.bfloat16, torch.device("cuda", 0))
    expected = alone.logits(case.prompt, CHUNK).cpu()
    for found in run(case):
        assert (found - expected).norm() < MOST_DIFFERENCE * expected.norm()
