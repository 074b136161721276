"""Rows of a vocabulary that are no tokens: nothing makes them possible, whoever computes logits."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.errors import CheckpointError
from longreach.engine.kv.pages import PagePool
from longreach.engine.messages import Delta, GenerationRequest, SamplingParameters
from longreach.engine.model.files import ModelFiles
from longreach.engine.model.load import load_model
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.model.vocabulary import VocabularyPart
from longreach.engine.parallel.mesh import Mesh
from longreach.engine.prefill.prefiller import Prefiller
from longreach.engine.text.tokenizer import Tokenizer

CPU = torch.device("cpu")
PROMPT = np.frombuffer(b"Once upon a time", dtype=np.uint8).astype(np.int32)
IDS = 259
"""Of the bundled tokenizer; the bundled model has 320 rows."""


def served(random: bool = False) -> Qwen2:
    files = ModelFiles(CHECKPOINT, CHECKPOINT, random)
    return load_model(files, Mesh.single(), torch.float32, CPU)


def logits_of(model: Qwen2, prompt: np.ndarray) -> torch.Tensor:
    prefiller = Prefiller(model, PagePool(model.page_geometry, 1, CPU), None)
    prefiller.admit("a", prompt)
    logits = prefiller.run_chunk("a", 0, len(prompt)).logits
    assert logits is not None
    return logits


def test_a_served_model_has_the_tokens_of_its_tokenizer() -> None:
    assert Tokenizer(CHECKPOINT).vocab_size == IDS
    logits = logits_of(served(), PROMPT)
    every = logits_of(Qwen2.load(CHECKPOINT, Mesh.single(), torch.float32, CPU), PROMPT)
    assert logits.shape == every.shape == (320,)
    assert torch.equal(logits[:IDS], every[:IDS])
    assert every.isfinite().all()
    assert (logits[IDS:] == -torch.inf).all()


def test_a_random_model_keeps_all_rows() -> None:
    assert logits_of(served(random=True), PROMPT).isfinite().all()


def test_a_served_checkpoint_needs_a_tokenizer(tmp_path: Path) -> None:
    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    shutil.copy(CHECKPOINT / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_model(ModelFiles(tmp_path, tmp_path), Mesh.single(), torch.float32, CPU)


@pytest.mark.parametrize(
    "sampling", [{}, {"top_k": 300}, {"top_p": 0.99999}, {"frequency_penalty": -2.0}], ids=str
)
def test_what_is_no_token_is_never_sampled(sampling: dict[str, Any]) -> None:
    """So hot that every row would come up: a fifth of what is drawn, were they not masked."""
    model = served()
    pool = PagePool(model.page_geometry, 4, CPU)
    decoder = Decoder(model, pool, TokenBytes(Tokenizer(CHECKPOINT).raw), 2)
    asked = SamplingParameters(
        60, temperature=100.0, seed=4, ignore_eos=True, top_logprobs=0, choices=2, **sampling
    )
    decoder.reserve(GenerationRequest("a", PROMPT, asked, 0.0))
    prefiller = Prefiller(model, pool, None)
    prefiller.admit("a", PROMPT, decoder.block_table("a"))
    logits = prefiller.run_chunk("a", 0, len(PROMPT)).logits
    assert logits is not None
    outputs = decoder.start("a", logits.numpy())
    while decoder.has_work:
        outputs += decoder.step()
    tokens = [each for _, delta in outputs if isinstance(delta, Delta) for each in delta.tokens]
    assert len(tokens) == 120
    assert max(each.token_id for each in tokens) < IDS
    assert all(np.isfinite(each.logprob) for each in tokens)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("total", [7, 96])
def test_tensor_ranks_hold_every_token_once(total: int, ranks: int) -> None:
    """Sums of what they look up, and what they join, are one process's."""
    parts = [VocabularyPart.of(total, Mesh(ranks, 1, rank)) for rank in range(ranks)]
    table, tokens = torch.rand(total, 3), torch.tensor([0, total - 1, 3, 3, total // 2])
    held = [table if part.rows is None else table[part.rows] for part in parts]
    padded = [
        torch.nn.functional.pad(own, (0, 0, 0, part.size - len(own)), value=torch.nan)
        for own, part in zip(held, parts, strict=True)
    ]
    looked_up = [part.embed(tokens, own) for own, part in zip(padded, parts, strict=True)]
    assert torch.equal(torch.stack(looked_up).sum(0), table[tokens])
    logits = torch.stack([own[:, 0].expand(2, -1) for own in padded])
    assert torch.equal(parts[0].joined(logits), table[:, 0].expand(2, -1))
