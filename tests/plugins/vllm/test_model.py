# pyright: reportMissingImports=false
# vLLM is installed in an environment of its own.
"""What vLLM's second model runner keeps of requests, without a GPU: `make test-vllm`."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

pytestmark = pytest.mark.live


def chosen(monkeypatch: pytest.MonkeyPatch, dual_chunks: Any, attends: str) -> type:
    """What vLLM chooses for a Qwen2 with one layer, whose attention is of a kind."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

    from longreach.plugins.vllm import model

    monkeypatch.setattr(model, "leave_rotation_to_attention", lambda: None)
    monkeypatch.setattr(
        Qwen2ForCausalLM, "__init__", lambda self, **given: nn.Module.__init__(self)
    )
    layer = object.__new__(Attention)
    nn.Module.__init__(layer)
    layer.attn_type = attends
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(dual_chunk_attention_config=dual_chunks),
            is_hybrid=False,
            is_attention_free=False,
        ),
        compilation_config=SimpleNamespace(static_forward_context={"layer": layer}),
    )
    return resolve_model_state_cls(config, model.LongQwen2ForCausalLM(vllm_config=config))


def test_of_dual_chunks_it_keeps_how_long_prompts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from longreach.plugins.vllm.model import KnowsPrompts

    assert chosen(monkeypatch, {"chunk_size": 384}, "decoder") is KnowsPrompts


def test_for_others_of_the_architecture_vllm_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedder that looks both ways has no KV cache, and its state is another."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.model_states.encoder_only import EncoderOnlyModelState

    assert chosen(monkeypatch, None, "decoder") is DefaultModelState
    assert chosen(monkeypatch, None, "encoder_only") is EncoderOnlyModelState
