"""Triton's interpreter, mended, where there is no GPU."""

import torch

from .interpreter import mend_bfloat16, mend_loop_bounds

if not torch.cuda.is_available():
    mend_bfloat16()
    mend_loop_bounds()
