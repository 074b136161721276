# pyright: reportMissingImports=false
# vLLM is installed in an environment of its own.
"""What a vLLM is told whose insides are others: `make test-vllm`."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longreach.plugins.vllm.errors import OtherPagesError
from longreach.plugins.vllm_decode.errors import OtherConnectorError, UnknownLayerError

pytestmark = pytest.mark.live

CONFIG: Any = SimpleNamespace(
    model_config=SimpleNamespace(
        get_num_kv_heads=lambda parallel: 2,
        get_head_size=lambda: 8,
    ),
    parallel_config=None,
)


def test_layers_come_by_their_numbers() -> None:
    from longreach.plugins.vllm_decode.layers import layers_of

    caches = {
        f"model.layers.{number}.self_attn.attn": torch.full((1, 2, 128, 16), float(number))
        for number in (10, 9)
    }
    assert [float(each.max()) for each in layers_of(caches, CONFIG)] == [9.0, 10.0]


def test_a_cache_of_no_layer_is_refused_by_its_name() -> None:
    from longreach.plugins.vllm_decode.layers import layers_of

    with pytest.raises(UnknownLayerError, match=r"model\.blocks\.1"):
        list(layers_of({"model.blocks.1": torch.zeros(1, 2, 128, 16)}, CONFIG))


def test_a_cache_with_gaps_is_refused_with_its_strides() -> None:
    from longreach.plugins.vllm_decode.layers import layers_of

    caches = {"model.layers.0": torch.zeros(3, 2, 128, 20)[..., :16]}
    with pytest.raises(OtherPagesError) as raised:
        list(layers_of(caches, CONFIG))
    assert raised.value.strides == (5120, 2560, 20, 1)


def test_another_connector_is_refused_by_its_class() -> None:
    from longreach.plugins.vllm_decode.connector import HandOffConnector, connector_of

    own = object.__new__(HandOffConnector)
    assert connector_of("worker", own) is own
    with pytest.raises(OtherConnectorError) as raised:
        connector_of("scheduler", None)
    found = raised.value
    assert (found.end, found.found, found.expected) == ("scheduler", "NoneType", "HandOffConnector")
