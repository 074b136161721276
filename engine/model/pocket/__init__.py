"""The pocket model: a small trained Qwen2 checkpoint, and the story that it was trained to read."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The trained checkpoint that ships with the package, in Hugging Face's layout."""
