"""Mends of Triton 3.6's interpreter: bfloat16, and loop bounds under NumPy 2.4.

It keeps bfloat16 as the bits of an unsigned integer, truncates where the hardware rounds to the
nearest even value, and multiplies matrices of those bits as if they were numbers. Its scalars
are arrays of one element, which NumPy no longer converts to a Python integer.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

_Array = npt.NDArray[Any]


def mend_bfloat16() -> None:
    """Make the interpreter's conversions and matrix products those of the hardware."""
    builder: Any = interpreter.InterpreterBuilder
    original_cast, original_dot = builder.cast_impl, builder.create_dot

    def cast(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(_rounded(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(_widened(source.data), tl.float32)
        return original_cast(self, source, target)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original_dot(self, *(_wide_handle(each) for each in (a, b)), *rest)

    builder.cast_impl, builder.create_dot = cast, dot


def mend_loop_bounds() -> None:
    """Let `range` take scalars that a kernel computed."""
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


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
