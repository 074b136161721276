"""What a layer does between its matrix products and attention: norms, activation, rotation.

On GPUs each function is one fused kernel; elsewhere it is its definition. Both round at the same
places, so an answer does not depend on which one ran, up to the order of float32 sums.

Where a product of 8 bits comes next (see `narrow`), norms and activation round their results for it
in the same pass.
"""

from torch import Tensor

from ..dual_chunk.segments import Rotation, SegmentQueries
from ..narrow import Narrowing, NarrowRows
from . import reference

__all__ = [
    "add_rms_norm",
    "narrow_add_rms_norm",
    "narrow_rms_norm",
    "narrow_swiglu",
    "rms_norm",
    "rotate_queries",
    "swiglu",
    "write_pages",
]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm (arXiv 1910.07467) of [n, hidden], computed in float32.

    The normed row is rounded to x's type before it is multiplied by `weight` [hidden].
    """
    return _version(x).rms_norm(x, weight, epsilon)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """`rms_norm(residual + x)` and `residual + x`, rounded to x's type; each [n, hidden]."""
    return _version(x).add_rms_norm(x, residual, weight, epsilon)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [n, intermediate], of gate_up [n, 2 * intermediate]: gate, then up.

    silu is computed in float32 and rounded before the product (arXiv 2002.05202).
    """
    return _version(gate_up).swiglu(gate_up)


def narrow_rms_norm(x: Tensor, weight: Tensor, epsilon: float, narrowing: Narrowing) -> NarrowRows:
    """`narrow.narrow_rows` of `rms_norm`."""
    return _version(x).narrow_rms_norm(x, weight, epsilon, narrowing)


def narrow_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, narrowing: Narrowing
) -> tuple[NarrowRows, Tensor]:
    """`add_rms_norm`, whose norm is narrowed and whose sum is not."""
    return _version(x).narrow_add_rms_norm(x, residual, weight, epsilon, narrowing)


def narrow_swiglu(gate_up: Tensor, narrowing: Narrowing) -> NarrowRows:
    """`narrow.narrow_rows` of `swiglu`."""
    return _version(gate_up).narrow_swiglu(gate_up, narrowing)


def rotate_queries(
    q: Tensor, intra: Rotation, successive: Rotation, inter: Rotation
) -> SegmentQueries:
    """Rotate q [n, heads, d] for each segment, in float32; q may be a view with rows apart.

    A segment whose rotation is the object `intra` gets the very tensor of `intra`.
    """
    return _version(q).rotate_queries(q, intra, successive, inter)


def write_pages(memory: Tensor, slots: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> None:
    """Rotate K and put K and V of n tokens into one layer's pages.

    Args:
        memory: [pages, kv_heads, 2, 128, d].
        slots: int64 [n], page * 128 + offset of each token; a token at -1 is not written.
        k: not rotated, [n, kv_heads, d]; k and v may be views with rows apart.
        rotation: of the n tokens, at their positions for keys.
    """
    _version(k).write_pages(memory, slots, k, v, rotation)


def _version(tensor: Tensor):
    """The module that serves this tensor's device; only GPUs need Triton installed."""
    if tensor.is_cuda:
        from . import triton_elementwise

        return triton_elementwise
    return reference
