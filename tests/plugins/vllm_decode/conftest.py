"""vLLM in this process, started once: it keeps what it has started in globals of its own."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from longreach.cluster.metrics import Metrics
from longreach.engine.decode.step import PromptLimits
from longreach.engine.kv.pages import PageGeometry
from longreach.engine.model.config import ModelConfig
from longreach.engine.model.files import ModelFiles
from longreach.engine.model.pocket import CHECKPOINT
from longreach.plugins.vllm_decode.decoder import VllmDecoder

from .asynchronous import schedule_asynchronously

if TYPE_CHECKING:
    from longreach.plugins.vllm_decode.vllm_core import VllmCore

PAGES = 64
"""That its sequences may have."""


@pytest.fixture(scope="session")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that vLLM's own metrics are written to."""
    return tmp_path_factory.mktemp("figures")


@pytest.fixture(scope="session")
def started(figures: Path) -> Iterator[VllmDecoder]:
    """With asynchronous scheduling, as on GPUs."""
    from longreach.plugins.vllm_decode.start import start

    config = ModelConfig.from_folder(CHECKPOINT)
    pages = PageGeometry(config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        schedule_asynchronously(patch)
        yield start(
            ModelFiles.of("pocket"), pages, PAGES, 4, PromptLimits(512, 256),
            Metrics(figures, "decode", "pocket"), None, on_gpu=False,
        )  # fmt: skip


@pytest.fixture(params=["steps", "queue"])
def decoder(
    started: VllmDecoder, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> VllmDecoder:
    """With vLLM's queue of batches, and without: then each step is heard of before the next.

    As vLLM is on CPUs, `test_cluster.py` has it.
    """
    core: Any = cast("VllmCore", started._core)._core
    if request.param == "steps":
        monkeypatch.setattr(core, "batch_queue", None)
        monkeypatch.setattr(core, "step_fn", core.step)
    return started
