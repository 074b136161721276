"""Triton kernels run in Triton's interpreter where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    # Triton decides when a kernel's module is imported; test modules are imported after this.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from .interpreter import mend_bfloat16, mend_loop_bounds

    mend_bfloat16()
    mend_loop_bounds()
