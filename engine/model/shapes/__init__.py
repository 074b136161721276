"""The sizes and published sparse budgets of real models, without their weights."""

from pathlib import Path

FOLDER = Path(__file__).parent


def known_shapes() -> dict[str, Path]:
    """Each shape's folder by its name, in Hugging Face's layout without weights and tokenizer."""
    return {path.parent.name: path.parent for path in sorted(FOLDER.glob("*/config.json"))}
