"""vLLM in this process, started once: it keeps what it has started in globals of its own."""

from collections import deque
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

if TYPE_CHECKING:
    from longreach.plugins.vllm_decode.vllm_core import VllmCore

PAGES = 64
"""That its sequences may have."""


@pytest.fixture(scope="session")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that vLLM's own metrics are written to."""
    return tmp_path_factory.mktemp("figures")


@pytest.fixture(scope="session")
def started(figures: Path) -> VllmDecoder:
    from longreach.plugins.vllm_decode.start import start

    config = ModelConfig.from_folder(CHECKPOINT)
    pages = PageGeometry(config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)
    return start(
        ModelFiles.of("pocket"), pages, PAGES, 4, PromptLimits(512, 256),
        Metrics(figures, "decode", "pocket"), None, on_gpu=False,
    )  # fmt: skip


@pytest.fixture(params=["steps", "queue"])
def decoder(
    started: VllmDecoder, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> VllmDecoder:
    """As vLLM runs on CPUs, and with a queue of batches as on GPUs, where the next is launched
    before the last is heard of.
    """
    if request.param == "queue":
        core: Any = cast("VllmCore", started._core)._core
        monkeypatch.setattr(core, "batch_queue", deque(maxlen=2))
        monkeypatch.setattr(core, "batch_queue_size", 2)
        monkeypatch.setattr(core, "step_fn", core.step_with_batch_queue)
    return started
