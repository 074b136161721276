# pyright: reportMissingImports=false, reportUntypedBaseClass=false
# vLLM is installed in an environment of its own.
"""What masks tokens, as vLLM's structured outputs take it: see `held_to`."""

from typing import Any

import torch
from vllm.v1.structured_output.backend_types import (
    StructuredOutputBackend,
    StructuredOutputGrammar,
)

from .errors import UnaskedError
from .held_to import HeldTo


class SequenceMasks(StructuredOutputGrammar):
    """As vLLM takes the masks of one sequence. Without speculation nothing is ever taken back."""

    def __init__(self, held_to: HeldTo) -> None:
        self._held_to = held_to

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self._held_to.take(tokens)
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens

    def rollback(self, num_tokens: int) -> None:
        raise UnaskedError("tokens to be taken back", "none are speculated")

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        self._held_to.fill(bitmask[batch_index].numpy().view("uint32"))

    def is_terminated(self) -> bool:
        return self._held_to.is_open

    def reset(self) -> None:
        raise UnaskedError("masks from the start again", "each sequence has its own")


class MasksBackend(StructuredOutputBackend):
    """As vLLM takes what compiles grammars; here they come compiled."""

    def compile_grammar(self, *args: Any, **kwargs: Any) -> StructuredOutputGrammar:
        raise UnaskedError("a grammar to be compiled", "they come compiled")

    def allocate_token_bitmask(self, max_num_seqs: int) -> torch.Tensor:
        return torch.full((max_num_seqs, -(-self.vocab_size // 32)), -1, dtype=torch.int32)

    def destroy(self) -> None:
        """Nothing is held."""
