"""Whether a checkpoint has budgets for sparse prefill, and from which length on they count.

Read without torch, which those who only check a file need not load; `sparsity` reads the budgets.
"""

from pathlib import Path

from ..json_files import read_json

BUDGETS_FILE = "sparse_attention_config.json"
DENSE_UP_TO = 32768


def has_budgets(folder: Path) -> bool:
    """Whether a checkpoint can be prefilled sparsely."""
    return (folder / BUDGETS_FILE).exists()


def dense_up_to(folder: Path) -> int:
    """Tokens of the longest prompt that is better prefilled densely, budgets or not.

    It may stand in config.json's `dual_chunk_attention_config`, under the name that vLLM reads.

    Raises:
        CheckpointError: config.json is missing or malformed.
    """
    keys = read_json(folder / "config.json").get("dual_chunk_attention_config") or {}
    return keys.get("sparse_attention_threshold", DENSE_UP_TO)
