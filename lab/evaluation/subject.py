"""A model and the texts on which its sparse prefill is measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...engine.errors import InvalidRequestError
from ...engine.messages import Tokens
from ...engine.model.config import WeightFormat
from ...engine.model.qwen2 import Qwen2
from ...engine.parallel.mesh import Mesh
from ...engine.text.files import read_text
from ...engine.text.tokenizer import Tokenizer
from .tasks import NEEDLES, Task


@dataclass(frozen=True)
class Subject:
    """A loaded model and prompts for it."""

    model: Qwen2
    prompts: tuple[Tokens, ...]

    @classmethod
    def of_file(
        cls,
        folder: Path,
        file: Path,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        weights: WeightFormat = "auto",
    ) -> "Subject":
        """With the first `tokens` tokens of a text.

        Raises:
            InvalidRequestError: the file cannot be read, is no text, or is shorter.
        """
        prompt = Tokenizer(folder).encode(read_text(file))[:tokens]
        if len(prompt) < tokens:
            raise InvalidRequestError(
                f"{file} has {len(prompt)} tokens, not {tokens}; name a longer one or ask for less"
            )
        return cls(Qwen2.load(folder, Mesh.single(), dtype, device, weights), (prompt,))

    @classmethod
    def of_seeds(
        cls,
        folder: Path,
        seeds: Sequence[int],
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        task: Task = NEEDLES[-1],
        weights: WeightFormat = "auto",
    ) -> "Subject":
        """With questions about made-up documents, one of `tokens` tokens for each seed."""
        tokenizer = Tokenizer(folder)

        def encode(content: str) -> Tokens:
            return tokenizer.encode_chat([{"role": "user", "content": content}])

        contents = [
            task.prompt(tokens, seed, None, lambda content: len(encode(content))).content
            for seed in seeds
        ]
        model = Qwen2.load(folder, Mesh.single(), dtype, device, weights)
        return cls(model, tuple(map(encode, contents)))
