"""Mends of Triton 3.6's interpreter: bfloat16, e4m3, and loop bounds under NumPy 2.4.

It keeps bfloat16 as the bits of an unsigned integer, truncates where the hardware rounds to the
nearest even value, and multiplies matrices of those bits as if they were numbers. Where a number's
rounding to e4m3 carries into the exponent, it forgets the carry. Its scalars are arrays of one
element, which NumPy no longer converts to a Python integer.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

_Array = npt.NDArray[Any]


def mend_conversions() -> None:
    """Make the interpreter's conversions and matrix products those of the hardware."""
    builder: Any = interpreter.InterpreterBuilder
    original_cast, original_dot = builder.cast_impl, builder.create_dot
    original_convert = builder.create_fp_to_fp

    def cast(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(_rounded(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(_widened(source.data), tl.float32)
        return original_cast(self, source, target)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original_dot(self, *(_wide_handle(each) for each in (a, b)), *rest)

    def convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.float8e4nv):
            return TensorHandle(_narrowed(source.data), tl.float8e4nv)
        if kinds[0] == tl.float8e4nv and kinds[1] in (tl.float16, tl.float32):
            wide = torch.from_numpy(source.data).view(torch.float8_e4m3fn).float().numpy()
            half = kinds[1] == tl.float16
            return TensorHandle(wide.astype(np.float16) if half else wide, kinds[1])
        return original_convert(self, source, target, rounding)

    builder.cast_impl, builder.create_dot, builder.create_fp_to_fp = cast, dot, convert


def mend_loop_bounds() -> None:
    """Let `range` take scalars that a kernel computed."""
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def _narrowed(values: _Array) -> _Array:
    """PyTorch's rounding, which is the hardware's for what e4m3 can hold."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).numpy()


def _wide_handle(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle(_widened(handle.data), tl.float32)


def _widened(bits: _Array) -> _Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: _Array) -> _Array:
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)
