"""Dual chunk attention: positions, the definition, and dense attention over pages."""

from .portable import attention, decode_attention
from .segments import BLOCK_ROWS, KeyBounds, QueryBlocks, SegmentQueries, Span, split_at_chunks

__all__ = [
    "BLOCK_ROWS",
    "KeyBounds",
    "QueryBlocks",
    "SegmentQueries",
    "Span",
    "attention",
    "decode_attention",
    "split_at_chunks",
]
