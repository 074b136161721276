"""Triton kernels run in Triton's interpreter where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported, which other tests do as well.
    os.environ.setdefault("TRITON_INTERPRET", "1")
