"""Memory that kernels allocate, made to show what they forget to write."""

import pytest
import torch


def poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and `torch.empty_like` of floats begin as NaN."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args, original=original, **kwargs):
            fresh = original(*args, **kwargs)
            return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        monkeypatch.setattr(torch, name, poisoned)
