"""Neighbouring numbers of 8 bits, read as pairs of 16 bits.

The second product of attention wants a tile's values along its tokens. The hardware transposes
numbers of 16 bits on their way to a tensor core and none of 8, which are then read one by one.
"""

import triton
import triton.language as tl

PAIR_SCALE = tl.constexpr(256.0)
"""What `split_pairs` leaves out: e4m3's exponents have a bias of 7, and float16's of 15."""


@triton.jit
def split_pairs(pairs, PACKED: tl.constexpr):
    """The e4m3 numbers of int16 pairs, the lower bytes' and the higher bytes', each as float16.

    Both are without loss and divided by `PAIR_SCALE`: sign, exponent and mantissa are moved to
    where float16 has them. What e4m3 calls NaN becomes 480.

    PACKED: two pairs at once in a register, for GPUs; Triton's interpreter knows no assembler.
    """
    if PACKED:
        # Each lop3 is (a & b) | c.
        lower, higher = tl.inline_asm_elementwise(
            """
            {
                .reg .b32 sign, rest;
                shl.b32 sign, $2, 8;
                shl.b32 rest, $2, 7;
                and.b32 rest, rest, 0x3f803f80;
                lop3.b32 $0, sign, 0x80008000, rest, 0xea;
                shr.u32 rest, $2, 1;
                and.b32 rest, rest, 0x3f803f80;
                lop3.b32 $1, $2, 0x80008000, rest, 0xea;
            }
            """,
            "=&r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
        return lower, higher
    bits = pairs.to(tl.int32)
    lower_bits = ((bits << 8) & 0x8000) | ((bits << 7) & 0x3F80)
    higher_bits = (bits & 0x8000) | ((bits >> 1) & 0x3F80)
    lower = lower_bits.to(tl.int16).to(tl.float16, bitcast=True)
    higher = higher_bits.to(tl.int16).to(tl.float16, bitcast=True)
    return lower, higher
