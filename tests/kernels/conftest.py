"""Triton's interpreter, mended, where there is no GPU."""

import torch

from .interpreter import mend_conversions, mend_loop_bounds

if not torch.cuda.is_available():
    mend_conversions()
    mend_loop_bounds()
