"""KV pages of 8 bits: e4m3 numbers, and a float32 scale for each page, KV head, and K or V.

A number is its page's scale times an e4m3 value (arXiv 2209.05433). Scales are powers of two, so
that scaling loses nothing: widened to bfloat16 a page has exactly the numbers that decode computes
with, and a page that outgrows its scale is scaled anew without being rounded again, but for numbers
under 1 / 28672 of the largest. e4m3 is a floating format, whose relative error hardly depends on
its scale: exact ones of amax / 448 gain nothing on random numbers, and a tenth of the error where a
few channels are far larger than the others. See docs/kernels/quantized.md.

On GPUs each function is one kernel; elsewhere it is its definition.
"""

from torch import Tensor

from ..dual_chunk.segments import Rotation
from . import reference

__all__ = ["append_tokens", "narrow_blocks", "narrow_pages", "widen_pages"]


def narrow_pages(
    memory: Tensor, scales: Tensor, pages: Tensor, k: Tensor, v: Tensor, rotation: Rotation
) -> None:
    """Rotate K and put K and V of n tokens, from a page's beginning on, into one layer's pages.

    The last page may be filled in part: the rest of it is zeros.

    Args:
        memory: float8_e4m3fn [pages, kv_heads, 2, 128, d].
        scales: float32 [pages, kv_heads, 2].
        pages: int64 [ceil(n / 128)], the page of each 128 tokens; none twice.
        k: not rotated, [n, kv_heads, d]; k and v may be views with rows apart.
        rotation: of the n tokens, at their positions for keys.
    """
    _version(k).narrow_pages(memory, scales, pages, k, v, rotation)


def narrow_blocks(
    memory: Tensor, scales: Tensor, blocks: Tensor, k: Tensor, v: Tensor, rotation: Rotation
) -> None:
    """As `narrow_pages`, for rows of several sequences, of which each may end within a page.

    Args:
        blocks: int32 [m, 3]: a page, the first of its rows among the n, and how many; 0 rows for a
            block that is not used.
    """
    _version(k).narrow_blocks(memory, scales, blocks, k, v, rotation)


def append_tokens(
    memory: Tensor, scales: Tensor, slots: Tensor, k: Tensor, v: Tensor, rotation: Rotation
) -> None:
    """Rotate K and put K and V of n tokens, each of another page, behind what their pages hold.

    Where a token is too large for its page's scale, the page is scaled anew. A token at offset 0
    begins its page: what the page and its scale held does not matter.

    Args:
        memory: float8_e4m3fn [pages, kv_heads, 2, 128, d].
        scales: float32 [pages, kv_heads, 2].
        slots: int64 [n], page * 128 + offset of each token; a token at -1 is not written.
        k: not rotated, [n, kv_heads, d]; k and v may be views with rows apart.
        rotation: of the n tokens, at their positions for keys.
    """
    _version(k).append_tokens(memory, scales, slots, k, v, rotation)


def widen_pages(memory: Tensor, scales: Tensor, table: Tensor, out: Tensor) -> None:
    """Write the numbers of pages `table` (int32 [n]) in their order, in the type of `out`.

    Args:
        memory: float8_e4m3fn [pages, kv_heads, 2, 128, d].
        scales: float32 [pages, kv_heads, 2].
        out: contiguous [n, kv_heads, 2, 128, d].
    """
    _version(memory).widen_pages(memory, scales, table, out)


def _version(tensor: Tensor):
    """The module that serves this tensor's device; only GPUs need Triton installed."""
    if tensor.is_cuda:
        from . import triton_quantized

        return triton_quantized
    return reference
