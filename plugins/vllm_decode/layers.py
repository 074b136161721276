"""vLLM's KV cache as pages: what a transport writes into, and reads from."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...engine.kv.pages import PageGeometry, PageMemory, Pages
from ...kernels.page_size import PAGE_TOKENS
from ..vllm.errors import OtherPagesError
from .errors import UnknownLayerError

_LAYER = re.compile(r"\blayers\.(\d+)\b")


class LayeredMemory(PageMemory):
    """One tensor a layer, [pages, kv_heads, 2, 128, head_dim], allocated by somebody else.

    Raises:
        OtherPagesError: one of them is laid out in another way.
    """

    def __init__(self, layers: Sequence[Tensor]) -> None:
        first = layers[0]
        self.device: torch.device = first.device
        self.geometry = PageGeometry(len(layers), first.shape[1], first.shape[-1], first.dtype)
        expected = (len(first), first.shape[1], 2, PAGE_TOKENS, first.shape[-1])
        for layer in layers:
            if tuple(layer.shape) != expected or not layer.is_contiguous():
                raise OtherPagesError(tuple(layer.shape), layer.stride(), expected)
        self._slabs = tuple(layer[None] for layer in layers)

    @property
    def num_pages(self) -> int:
        """Those that no sequence may have included."""
        return self._slabs[0].shape[1]

    @property
    def slabs(self) -> tuple[Tensor, ...]:
        return self._slabs

    @property
    def scale_slabs(self) -> tuple[Tensor, ...]:
        return ()

    def layer(self, layer: int) -> Pages:
        return Pages(self._slabs[layer][0])


def layers_of(caches: dict[str, Tensor], config: Any) -> Iterable[Tensor]:
    """vLLM's tensors in the order of layers, as pages of a rank's heads; `config` is vLLM's.

    Raises:
        OtherPagesError: one of them is laid out in another way.
        UnknownLayerError: one of them is of no layer.
    """
    from ..vllm.backend import as_pages

    model, parallel = config.model_config, config.parallel_config

    heads, size = model.get_num_kv_heads(parallel), model.get_head_size()
    for name in sorted(caches, key=_number):
        yield as_pages(caches[name], heads, size)


def _number(name: str) -> int:
    """Of the layer whose tensor has this name."""
    found = _LAYER.search(name)
    if found is None:
        raise UnknownLayerError(name)
    return int(found.group(1))
