"""Which model architectures are served.

Another one begins here, with its name. What it does otherwise is said where each thing is done: its
sizes in `config`, the norms and products of a layer in `layer`, the names of its tensors in the
module of its own beside `qwen2`, and which of these a checkpoint gets in `load`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

SERVED = ("Qwen2ForCausalLM",)
"""By the names that checkpoints have for them in `config.json`."""


def check_architecture(raw: Mapping[str, Any], folder: Path | str) -> None:
    """Refuse a checkpoint that nothing here computes as it was trained.

    Args:
        raw: its `config.json`.
        folder: where it lies, or what it is called elsewhere; for the message.

    Raises:
        CheckpointError: another architecture, or a kind of attention that is not served.
    """
    named = raw.get("architectures") or []
    if not set(SERVED) & set(named):
        raise CheckpointError(
            f"{folder}: architecture {named} is not supported; Longreach serves {', '.join(SERVED)}"
        )
    if raw.get("use_sliding_window"):
        raise CheckpointError(f"{folder}: sliding-window attention is not supported")
