"""vLLM's KV cache as pages: every transport reaches each layer of it."""

import numpy as np
import pytest
import torch

from longreach.cluster.transports.announced import AnnouncedRun
from longreach.cluster.transports.nixl import NixlAgent
from longreach.cluster.transports.shared_pages import SharedPageReader, SharedPool
from longreach.engine.kv.hand_off import Place
from longreach.engine.kv.pages import PageGeometry, PagePool, Pages
from longreach.kernels.page_size import PAGE_TOKENS
from longreach.plugins.vllm.errors import OtherPagesError
from longreach.plugins.vllm_decode.layers import LayeredMemory

LAYERS, PAGES, HEADS, SIZE = 3, 5, 2, 8


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(PAGES, HEADS, 2, PAGE_TOKENS, SIZE) for _ in range(LAYERS)]


def test_a_layer_is_the_tensor_that_vllm_has() -> None:
    layers = tensors()
    memory = LayeredMemory(layers)
    assert memory.geometry == PageGeometry(LAYERS, HEADS, SIZE, torch.float32)
    assert memory.num_pages == PAGES
    values = torch.ones(2, 1, 2, PAGE_TOKENS, SIZE)
    memory.put(1, torch.tensor([4, 0]), 1, Pages(values))
    assert torch.equal(layers[1][[4, 0], 1:], values)
    held = memory.held(2, np.array([3, 1]))
    assert torch.equal(held.read().values, layers[2][[3, 1]])


@pytest.mark.parametrize("wrong", ["shape", "order"])
def test_other_layouts_are_refused(wrong: str) -> None:
    layers = tensors()
    if wrong == "shape":
        layers[1] = torch.zeros(PAGES, 2, HEADS, PAGE_TOKENS, SIZE + 8)
    else:
        layers[1] = torch.zeros(PAGES, HEADS, 2, SIZE, PAGE_TOKENS).transpose(3, 4)
    with pytest.raises(OtherPagesError):
        LayeredMemory(layers)


def test_it_is_shared_with_other_processes_of_the_host() -> None:
    memory = LayeredMemory(tensors())
    pool = PagePool(memory.geometry, 2, memory.device)

    def put(request_id: str, place: Place, pages: Pages) -> None:
        pool.put(place.layer, torch.tensor([1, 0]), place.first_kv_head, pages)

    reader = SharedPageReader("here", memory.device, None, put)
    shared = SharedPool.of(memory, "here")
    for layer in range(LAYERS):
        run = AnnouncedRun(Place(layer, 0, 0), np.array([4, 2]))
        assert reader.read("a", shared, [run]) == 2 * pool.geometry.bytes_per_page // LAYERS
        assert torch.equal(pool.layer(layer).values[[1, 0]], memory.layer(layer).values[[4, 2]])


def test_nixl_reads_from_it_and_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nixl_cu12")
    monkeypatch.setenv("UCX_TLS", "tcp")
    memory = LayeredMemory(tensors())
    pool = PagePool(memory.geometry, 4, memory.device)
    pool.memory.normal_()
    theirs, ours = NixlAgent(pool), NixlAgent(memory)
    before = memory.layer(0).values.clone()
    runs = [
        (AnnouncedRun(Place(layer, 0, 0), np.array([1, 3])), memory.held(layer, np.array([4, 0])))
        for layer in (1, 2)
    ]
    ours.read(theirs.pool, runs)
    for layer in (1, 2):
        assert torch.equal(memory.layer(layer).values[[4, 0]], pool.layer(layer).values[[1, 3]])
    assert torch.equal(memory.layer(0).values, before)
    back = [(AnnouncedRun(Place(1, 0, 0), np.array([0])), pool.held(2, np.array([2])))]
    theirs.read(ours.pool, back)
    assert torch.equal(pool.layer(2).values[2], memory.layer(1).values[0])
