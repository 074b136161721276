# pyright: reportMissingImports=false
# vLLM is installed in an environment of its own.
"""What vLLM's backend makes of a step, without a server: `make test-vllm`."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from longreach.engine.model.pocket import CHECKPOINT
from longreach.plugins.vllm.errors import OtherPagesError, UnknownPromptError, UntoldError
from longreach.plugins.vllm.model_attention import ModelAttention

from .steps import raw_config

if TYPE_CHECKING:
    from longreach.plugins.vllm.backend import DualChunkMetadataBuilder

pytestmark = pytest.mark.live


@pytest.fixture
def builder() -> "DualChunkMetadataBuilder":
    """As vLLM has one on a CPU, which was told nothing yet."""
    from longreach.plugins.vllm.backend import DualChunkMetadataBuilder

    made = object.__new__(DualChunkMetadataBuilder)
    made._model = ModelAttention.of(raw_config(CHECKPOINT), 4, 2, 0)
    made._inputs = made._plain = None
    made.prompts = np.zeros(0, dtype=np.int64)
    return made


def step(slots: list[int]) -> Any:
    """A decode, and a prompt's piece of two rows, as vLLM describes them."""
    return SimpleNamespace(
        query_start_loc_cpu=torch.tensor([0, 1, 3]),
        seq_lens_cpu_upper_bound=torch.tensor([9, 2]),
        block_table_tensor=torch.tensor([[1], [2]], dtype=torch.int32),
        positions=torch.tensor([8, 0, 1]),
        slot_mapping=torch.tensor(slots),
    )


def test_a_step_is_refused_whose_prompts_nobody_told_of(
    builder: "DualChunkMetadataBuilder",
) -> None:
    """Its prompts would be computed densely, at another temperature, without a word."""
    asked = step([136, 256, 257])
    with pytest.raises(UnknownPromptError):
        builder.build(0, asked)
    builder.prompts = np.array([5, 2])
    builder.build(0, asked)
    with pytest.raises(UnknownPromptError):  # what was said was of the step before
        builder.build(0, asked)


def test_a_step_that_nobody_asked_for_has_no_prompts(builder: "DualChunkMetadataBuilder") -> None:
    builder.build(0, step([-1, -1, -1]))


@pytest.mark.parametrize("wrong", ["gaps", "size"])
def test_blocks_that_are_no_pages_are_refused_with_what_they_are(wrong: str) -> None:
    from longreach.plugins.vllm.backend import as_pages

    cache = torch.zeros(5, 2, 128, 2 * 8)
    assert as_pages(cache, 2, 8).shape == (5, 2, 2, 128, 8)
    other = cache[:, :, :, :12] if wrong == "gaps" else cache[:, :, :100]
    with pytest.raises(OtherPagesError) as raised:
        as_pages(other, 2, 8)
    assert raised.value.shape == other.shape
    assert raised.value.strides == other.stride()
    assert raised.value.expected == (-1, 2, 2, 128, 8)


@pytest.mark.parametrize("untold", ["layer_idx", "num_kv_heads"])
def test_attention_that_is_not_told_which_layer_it_is_of_is_refused(
    untold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longreach.plugins.vllm import backend

    monkeypatch.setattr(backend, "get_current_vllm_config", lambda: None)
    monkeypatch.setattr(backend, "check", lambda config, version: None)
    told: dict[str, Any] = {"num_kv_heads": 2, "layer_idx": 0, untold: None}
    with pytest.raises(UntoldError, match=untold):
        backend.DualChunkImpl(4, 64, 0.125, **told)
