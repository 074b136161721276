"""Which engine a worker has, by its settings."""

from typing import Any

import pytest
import torch

from longreach.cluster.decode import engines
from longreach.cluster.decode.engines import GROUP, make_engine
from longreach.cluster.remedies import remedied
from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.step import PromptLimits
from longreach.engine.errors import NoVllmError
from longreach.engine.kv.pages import PageGeometry
from longreach.engine.model.files import ModelFiles
from longreach.kernels.page_size import PAGE_TOKENS

from ..conftest import make_settings

SETTINGS = make_settings(1)
KEPT: Any = object()
"""Whoever keeps figures; nothing is told here."""
SMALL = {"kv_cache_tokens": 1024, "prefill_up_to": 512, "max_batch": 3}


def worker_settings(engine: str, **model: Any) -> Any:
    decode = SETTINGS.decode.model_copy(update={**SMALL, "engine": engine})
    changed = {"decode": decode, "model": SETTINGS.model.model_copy(update=model)}
    return SETTINGS.model_copy(update=changed).worker


def test_the_own_one_is_made_unless_another_is_asked_for() -> None:
    engine = make_engine(worker_settings("native"), KEPT)
    assert isinstance(engine, Decoder)


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_another_one_is_started_by_whoever_declares_it(
    monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], kept: torch.dtype
) -> None:
    asked: list[Any] = []

    def start(*given: Any, on_gpu: bool) -> str:
        asked.extend((*given, on_gpu))
        return "the engine"

    class Entry:
        def load(self) -> Any:
            return start

    def declared(group: str, name: str) -> list[Entry]:
        assert (group, name) == (GROUP, "vllm")
        return [Entry()]

    monkeypatch.setattr(engines, "entry_points", declared)
    assert make_engine(worker_settings("vllm", **model), KEPT) == "the engine"
    files, pages, num_pages, max_batch, prompts, figures, on_gpu = asked
    assert files == ModelFiles.of("pocket")
    assert pages == PageGeometry(pages.num_layers, pages.num_kv_heads, pages.head_dim, kept)
    assert (num_pages, max_batch, on_gpu) == (1024 // PAGE_TOKENS, 3, False)
    assert prompts == PromptLimits(512, 512)
    assert figures is KEPT


def test_one_that_nobody_declares_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "entry_points", lambda group, name: [])
    with pytest.raises(NoVllmError) as refused:
        make_engine(worker_settings("vllm"), KEPT)
    assert "set decode.engine: native" in str(remedied(refused.value))
