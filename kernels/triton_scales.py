"""Scales of numbers that are kept as e4m3; see `quantized.reference` and `narrow.reference`."""

import triton
import triton.language as tl


@triton.jit
def scale_for(largest):
    """The least power of two that brings float32 `largest` to 448 or less, and its reciprocal."""
    bits = largest.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.maximum(exponent, 1)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    reciprocal = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, reciprocal


@triton.jit
def e4m3_scale(largest):
    """The scale that makes float32 `largest` 448, and its reciprocal; see `narrow.reference`."""
    scale = tl.maximum(tl.div_rn(largest, 448.0), 2.0**-64)
    return scale, tl.div_rn(1.0, scale)
