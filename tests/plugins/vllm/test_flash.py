"""Which steps FlashAttention computes, and what it is asked for; neither it nor vLLM is needed."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longreach.plugins.vllm.decode_rows import PortableDecodeRows
from longreach.plugins.vllm.flash import PlainStep, PlainSteps
from longreach.plugins.vllm.model_attention import ModelAttention
from longreach.plugins.vllm.piece_attention import PieceAttention, table_of
from longreach.plugins.vllm.step_attention import PlainAttention, StepAttention
from longreach.plugins.vllm.step_plan import StepPlan
from tests.engine.checkpoints import make_checkpoint

from .steps import CPU, raw_config
from .test_step_attention import sparse_beyond
from .test_step_plan import plan

CHUNKS = {"chunk_size": 384, "local_size": 128, "original_max_position_embeddings": 300}
"""A stride of 256; temperature rises beyond 300."""


def model(folder: Path, sparse: bool = False) -> ModelAttention:
    """Sparse beyond 200 tokens."""
    made = make_checkpoint(folder, CHUNKS, sparse=(64, 128) if sparse else None)
    if sparse:
        sparse_beyond(made, 200)
    return ModelAttention.of(raw_config(made), 4, 2, 0)


def is_plain(model: ModelAttention, step: StepPlan) -> bool:
    return PlainSteps(model, 3).of(step, None) is not None


def test_short_prompts_are_plain_beside_short_decodes(tmp_path: Path) -> None:
    common, step = object(), plan([1, 100, 256], [250, 200, 256], [200, 290, 256])
    assert PlainSteps(model(tmp_path), 3).of(step, common) == PlainStep(3, common, 256)


def test_decodes_alone_are_none_of_these(tmp_path: Path) -> None:
    assert not is_plain(model(tmp_path), plan([1, 1], [250, 20], [200, 20]))


@pytest.mark.parametrize("longer", ["decode", "piece"])
def test_one_sequence_beyond_its_first_dual_chunk_is_one_too_many(
    tmp_path: Path, longer: str
) -> None:
    ends = [257, 100] if longer == "decode" else [100, 257]
    assert not is_plain(model(tmp_path), plan([1, 50], ends, ends))
    assert is_plain(model(tmp_path), plan([1, 50], [256, 256], [256, 256]))


@pytest.mark.parametrize("longer", ["decode", "piece"])
def test_a_prompt_that_becomes_long_has_another_temperature(tmp_path: Path, longer: str) -> None:
    """From its first piece on, and a last token that vLLM computes as a decode's."""
    prompts = [400, 100] if longer == "decode" else [100, 400]
    assert not is_plain(model(tmp_path), plan([1, 50], [100, 100], prompts))


def test_sparse_pieces_are_none_of_these_and_those_in_full_are(tmp_path: Path) -> None:
    """The last rows of a sparse prompt attend in full, and so does what was generated."""
    subject = model(tmp_path, sparse=True)
    assert not is_plain(subject, plan([128], [128], [290]))
    assert not is_plain(subject, plan([20, 128], [20, 128], [20, 290]))
    assert is_plain(subject, plan([122], [250], [290]))
    assert is_plain(subject, plan([128], [128], [200]))
    assert is_plain(subject, plan([40], [240], [200]))


def test_without_a_gpu_no_step_is_plain(tmp_path: Path) -> None:
    assert PlainSteps.where_there_are(CPU, model(tmp_path)) is None


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: Tensor,
    fa_version: int,
) -> None:
    """As FlashAttention documents itself: k and v are [pages, 128, kv_heads, d]."""
    assert causal
    assert fa_version == 3
    assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(seqused_k.max()))
    for first, last, end, table in zip(
        cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), seqused_k.tolist(), block_table,
        strict=True,
    ):  # fmt: skip
        keys, values = (each[table.long()].flatten(0, 1)[:end] for each in (k, v))
        group = q.shape[1] // keys.shape[1]
        logits = torch.einsum("qhd,khd->hqk", q[first:last], keys.repeat_interleave(group, 1))
        sees = torch.arange(end - last + first, end)[:, None] >= torch.arange(end)
        weights = (logits * softmax_scale).masked_fill(~sees, -torch.inf).softmax(-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1))


def test_one_call_computes_what_the_kernels_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode, a prompt's second piece and a whole prompt, over pages that lie in disorder."""
    fa_utils: Any = SimpleNamespace(flash_attn_varlen_func=flash_attention)
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.fa_utils", fa_utils)
    counts, ends = [1, 70, 150], [200, 170, 150]
    subject, step = model(tmp_path), plan(counts, ends, [180, 190, 150])
    tables = torch.tensor([[5, 2], [1, 6], [4, 3]], dtype=torch.int32)
    common = SimpleNamespace(
        query_start_loc=torch.tensor([0, 1, 71, 221], dtype=torch.int32),
        max_query_len=150,
        seq_lens=torch.tensor(ends, dtype=torch.int32),
        block_table_tensor=tables,
    )
    plain = PlainSteps(subject, 3).of(step, common)
    assert plain is not None
    where = [torch.arange(end - n, end) for n, end in zip(counts, ends, strict=True)]
    positions = torch.cat(where)
    slots = torch.cat(
        [table[each // 128] * 128 + each % 128 for table, each in zip(tables, where, strict=True)]
    )
    found = [attended(subject, step, positions, slots, tables, each) for each in (plain, None)]
    # Both are in float32, and sum in another order.
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def attended(
    model: ModelAttention,
    step: StepPlan,
    positions: Tensor,
    slots: Tensor,
    tables: Tensor,
    plain: PlainAttention | None,
) -> Tensor:
    """One layer's rows, in one call or by the plugin's kernels."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, model.head_dim, generator=generator)

    memory = draw(7, model.num_kv_heads, 2, 128)
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    q, k, v = (draw(step.rows, each) for each in heads)
    pieces = [
        PieceAttention(model, each, table_of(tables, each.sequence), positions[each.rows])
        for each in step.pieces
    ]
    decodes = PortableDecodeRows(model, step, tables)
    output = torch.full_like(q, np.nan)
    made = StepAttention(model, step.rows, positions, slots, decodes, pieces, plain)
    made.attend(0, q, k, v, memory, output)
    return output
