"""The pocket model: its checkpoint answers, and its corpus and trainer can make it again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from longreach.cluster.cli.needle import hide_key
from longreach.engine.local import LocalPrefill
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.model.pocket.story import PASS_KEY_QUESTION
from longreach.engine.text.tokenizer import Tokenizer
from longreach.kernels.dual_chunk import reference
from longreach.lab.evaluation.in_process import InProcessAnswerer, Variant
from longreach.lab.evaluation.tasks import NEEDLES
from longreach.lab.pocket.attention import dual_chunk_attention
from longreach.lab.pocket.corpus import (
    Stage,
    make_batch,
    one_of_facts_prompt,
    pass_key_prompt,
)
from longreach.lab.pocket.model import PocketQwen2, PocketSizes
from longreach.lab.pocket.text import HELD_OUT_NOUNS
from longreach.lab.pocket.tokenizer import TURN_END_ID, build_tokenizer
from longreach.lab.pocket.train import CYCLES, Cycle, Trainer

CPU = torch.device("cpu")
STAGES = CYCLES[0].stages
MOST_BYTES = 8_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(CHECKPOINT)


def demo_prompt(tokenizer: Tokenizer, tokens: int, seed: int = 1):
    hidden = hide_key(tokens, lambda messages: len(tokenizer.encode_chat(messages)), seed)
    return tokenizer.encode_chat(hidden.messages), hidden.expected


def few(stage: Stage) -> Stage:
    return replace(stage, sequences=4, steps=1)


def test_the_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= MOST_BYTES


def test_transformers_answers_the_demo_and_the_engine_agrees(tokenizer: Tokenizer) -> None:
    prompt, key = demo_prompt(tokenizer, 1500)
    model = Qwen2ForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    answer = [*key.encode(), TURN_END_ID]
    tokens = torch.tensor([[*prompt.tolist(), *answer[:-1]]])
    with torch.inference_mode():
        expected = model(tokens).logits[0, len(prompt) - 1 :]
    assert expected.argmax(-1).tolist() == answer
    logits = LocalPrefill(CHECKPOINT, len(prompt)).logits(prompt)
    torch.testing.assert_close(logits, expected[0], atol=1e-3, rtol=1e-3)


def test_one_of_twelve_facts_with_new_names_is_found() -> None:
    answerer = InProcessAnswerer(CHECKPOINT, [Variant.DENSE], 4096 + 512, torch.float32)
    facts = next(task for task in NEEDLES if task.name == "one-of-12-facts")
    for seed in range(3):
        prompt = facts.prompt(4096, seed, None, answerer.counter(""))
        answer = answerer.answer("dense", prompt.content, 48, lambda _: None)
        assert (answer.text, answer.prompt_tokens) == (prompt.expected[0], 4096)


def test_the_training_model_is_the_engines_beyond_one_chunk(tmp_path: Path) -> None:
    model = PocketQwen2(PocketSizes())
    weights = load_file(CHECKPOINT / "model.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    prompt = np.random.default_rng(0).integers(0, 250, 6000, dtype=np.int32)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    # The training model's attention is dense.
    config["dual_chunk_attention_config"] |= {
        "original_max_position_embeddings": 2048,
        "sparse_attention_threshold": len(prompt),
    }
    folder = tmp_path / "sharpened"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "config.json").write_text(json.dumps(config))
    temperature = (0.1 * np.log(len(prompt) / 2048) + 1) ** 2
    with torch.inference_mode():
        trained = model(torch.from_numpy(prompt).long()[None], temperature)[-1]
    served = LocalPrefill(folder, len(prompt)).logits(prompt)
    torch.testing.assert_close(trained, served, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("stage", STAGES[:7], ids=lambda stage: f"length-{stage.length}")
def test_the_corpus_is_seeded_and_whole_text(stage: Stage) -> None:
    one, same, other = (make_batch(few(stage), seed, 3) for seed in (0, 0, 1))
    assert (one.tokens == same.tokens).all()
    assert (one.recalled == same.recalled).all()
    assert (one.tokens != other.tokens).any()
    tokenizer = build_tokenizer()
    for row in one.tokens:
        text = tokenizer.decode(row.tolist(), skip_special_tokens=False)
        assert tokenizer.encode(text).ids == row.tolist()


def test_answers_end_their_turn_and_names_for_evaluation_are_new() -> None:
    batch = make_batch(few(STAGES[3]), 0, 0)
    assert (batch.recalled & (batch.tokens == TURN_END_ID)).any()
    text = bytes(np.where(batch.tokens < 256, batch.tokens, 10).astype(np.uint8).ravel()).decode()
    assert not any(noun in text.lower() for noun in HELD_OUT_NOUNS)


@pytest.mark.parametrize("make", [pass_key_prompt, one_of_facts_prompt])
def test_evaluation_prompts_have_their_size_and_their_answer(make) -> None:
    prompt = make(3000, 5)
    assert len(prompt.content.encode()) == 3000
    assert prompt.expected in prompt.content
    assert make(3000, 5) == prompt
    assert make(3000, 6) != prompt


def test_the_pass_key_is_asked_for_as_the_demo_does() -> None:
    document = pass_key_prompt(2000, 0).content
    message = hide_key(2000, lambda messages: len(messages[0]["content"]), 0).messages[0]
    assert document.endswith(f"\n{PASS_KEY_QUESTION}")
    assert message["content"].endswith(f"\n{PASS_KEY_QUESTION}")


def tiny_trainer(folder: Path) -> Trainer:
    sizes = PocketSizes(
        hidden_size=32, intermediate_size=32, num_layers=1, head_dim=8, chunk_size=64, local_size=8
    )
    long = Stage(300, 2, 2, (0.5, 0.9), 2, 3, tail=56, near=0.5)
    cycles = (
        Cycle(1e-3, 1, (Stage(64, 2, 2, (0.0, 0.3), 1, 1),)),
        Cycle(5e-4, 1, (long,)),
    )
    return Trainer(folder, cycles, sizes)


def test_training_that_ran_out_of_time_goes_on_as_if_it_had_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_trainer(tmp_path / "whole").run()
    assert "time is up" not in capsys.readouterr().out
    for step in (1, 2, 3):
        tiny_trainer(tmp_path / "parts").run(seconds=0)
        assert (tmp_path / "parts" / "checkpoint" / "config.json").exists()
        assert f"time is up after step {step} of 4" in capsys.readouterr().out
    tiny_trainer(tmp_path / "parts").run()
    whole, parts = (
        load_file(tmp_path / name / "checkpoint" / "model.safetensors")
        for name in ("whole", "parts")
    )
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name]), name


CHUNK, LOCAL, HEAD_DIM = 24, 5, 16


def rotated(vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[n, heads, d] turned by RoPE as one complex number a pair."""
    frequencies = 1e4 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    turn = torch.polar(torch.ones(1).double(), positions.double()[:, None] * frequencies)
    pairs = torch.complex(*vectors.chunk(2, -1)) * turn[:, None]
    return torch.cat((pairs.real, pairs.imag), -1)


@pytest.mark.parametrize("far_chunks", [None, 1, 3])
@pytest.mark.parametrize("length", [19, 30, 57, 133])
def test_attention_for_training_has_the_references_gradients(
    length: int, far_chunks: int | None
) -> None:
    torch.manual_seed(length)
    stride = CHUNK - LOCAL
    q, k, v = (
        torch.randn(length, heads, HEAD_DIM, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    index = torch.arange(length)
    chunk, offset = index // stride, index % stride
    successive = torch.clamp(offset + stride, max=CHUNK)
    queries = [rotated(q, each) for each in (offset, successive, torch.full_like(offset, CHUNK))]
    intra, successive, inter, turned, values = (
        each[None] for each in (*queries, rotated(k, offset), v)
    )
    attended = dual_chunk_attention(
        intra, successive, inter, turned, values, stride, 0.3, far_chunks
    )[0]

    relative = reference.relative_positions(length, CHUNK, LOCAL)
    logits = reference.scores(q, k, relative, 1e4, 0.3)
    if far_chunks is not None:
        near = chunk < -(-length // stride) - far_chunks
        unseen = near[:, None] & (chunk[:, None] - chunk >= 2)
        logits = logits.masked_fill(unseen, -torch.inf)
    expected, _ = reference.attention(logits, v)
    torch.testing.assert_close(attended, expected, atol=2e-6, rtol=1e-5)
    weights = torch.randn_like(expected)
    for name, got, want in zip(
        "qkv",
        torch.autograd.grad(attended, (q, k, v), weights),
        torch.autograd.grad(expected, (q, k, v), weights),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=name)
