"""vLLM in this process, started once: it keeps what it has started in globals of its own."""

from pathlib import Path

import pytest
import torch

from longreach.cluster.metrics import Metrics
from longreach.engine.decode.step import PromptLimits
from longreach.engine.kv.pages import PageGeometry
from longreach.engine.model.config import ModelConfig
from longreach.engine.model.files import ModelFiles
from longreach.engine.model.pocket import CHECKPOINT
from longreach.plugins.vllm_decode.decoder import VllmDecoder

PAGES = 64
"""That its sequences may have."""


@pytest.fixture(scope="session")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that vLLM's own metrics are written to."""
    return tmp_path_factory.mktemp("figures")


@pytest.fixture(scope="session")
def decoder(figures: Path) -> VllmDecoder:
    from longreach.plugins.vllm_decode.start import start

    config = ModelConfig.from_folder(CHECKPOINT)
    pages = PageGeometry(config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)
    return start(
        ModelFiles.of("pocket"), pages, PAGES, 4, PromptLimits(512, 256),
        Metrics(figures, "decode", "pocket"), None, on_gpu=False,
    )  # fmt: skip
