"""Recall of values from documents of training's kind."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from longreach.engine.kv.pages import PagePool
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.parallel.mesh import Mesh
from longreach.engine.prefill.prefiller import Prefiller
from longreach.engine.prefill.sparsity import SparsityConfig
from longreach.kernels.page_size import pages_for
from longreach.lab.pocket.recalled import Document, Turn, recalled_whole

LENGTH = 6000


@pytest.mark.parametrize("sparse", [True, False])
def test_values_are_recalled_and_others_are_not(sparse: bool) -> None:
    document = Document.made_up(LENGTH, 0)
    assert len(document.turns) >= 3
    turns = document.turns[:3]
    [last] = turns[-1:]
    other = last.tokens.copy()
    other[last.answer] = ord("7") if other[last.answer] != ord("7") else ord("8")
    document = replace(document, turns=(*turns, Turn(other, last.answer)))
    model = Qwen2.load(CHECKPOINT, Mesh.single(), torch.float32, torch.device("cpu"), "auto")
    pool = PagePool(model.page_geometry, pages_for(LENGTH), model.device)
    sparsity = SparsityConfig.from_folder(CHECKPOINT) if sparse else None
    found = recalled_whole(Prefiller(model, pool, sparsity), pool, document)
    assert found == [True, True, True, False]
    assert len(pool.allocate(pool.num_pages)) == pool.num_pages


def test_documents_are_those_of_their_number() -> None:
    one, same, other = (Document.made_up(LENGTH, number) for number in (1, 1, 2))
    assert np.array_equal(one.beginning, same.beginning)
    assert not np.array_equal(one.beginning, other.beginning)
