"""Meets every kind of piece before the first request does.

Kernels are compiled for a GPU when they are first launched, in several versions: without this, the
first long prompt would wait for them.
"""

from collections.abc import Iterator

import torch

from ...kernels.dual_chunk import BLOCK_ROWS
from ...kernels.page_size import PAGE_TOKENS, pages_for
from .model_attention import ModelAttention
from .piece_attention import PieceAttention, table_of
from .step_attention import StepAttention
from .step_plan import Piece

_ROWS = 5 * BLOCK_ROWS + 3


@torch.inference_mode()
def warm_up(model: ModelAttention, longest: int, dtype: torch.dtype, device: torch.device) -> None:
    """Attend to nothing: every page of every piece is the same one, of zeros.

    Args:
        longest: tokens of the longest prompt.
    """
    shape = (1, model.num_kv_heads, 2, PAGE_TOKENS, model.head_dim)
    memory = torch.zeros(shape, dtype=dtype, device=device)
    tables = torch.zeros(1, pages_for(longest), dtype=torch.int32, device=device)
    for piece in kinds_of_pieces(model, longest):
        count = piece.end - piece.start
        positions = torch.arange(piece.start, piece.end, device=device)
        # As a model's product leaves them: one row after another, with all heads in it.
        heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
        projected = torch.zeros(count, sum(heads), model.head_dim, dtype=dtype, device=device)
        output = torch.empty_like(projected[:, : model.num_heads].contiguous())
        own = PieceAttention(model, piece, table_of(tables, 0), positions)
        step = StepAttention(model, count, positions, positions % PAGE_TOKENS, None, [own])
        q, k, v = projected.split_with_sizes(heads, 1)
        step.attend(0, q, k, v, memory, output)


def kinds_of_pieces(model: ModelAttention, longest: int) -> Iterator[Piece]:
    """Of a short prompt, and of the longest: in each dual chunk that differs, and at the end.

    They begin where pages do, and elsewhere.
    """
    short = min(longest, _ROWS)
    yield Piece(0, 0, 0, short, short, True)
    stride = model.stride or longest
    starts = {0, *(border + 1 for border in (stride, 2 * stride)), max(0, longest - _ROWS)}
    for start in sorted(starts):
        end = min(start + _ROWS, longest)
        if start < end:
            yield Piece(0, 0, start, end, longest, True)
