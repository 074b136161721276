"""The pocket model: a small trained Qwen2 checkpoint, and the code that made it."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The trained checkpoint that ships with the package, in Hugging Face's layout."""
