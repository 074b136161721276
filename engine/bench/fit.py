"""Whether what is asked for fits in the device's memory, before anything is run."""

import os
from dataclasses import dataclass

import torch

from ..errors import ConfigurationError
from ..pages import PAGE_TOKENS, PageGeometry, pages_for
from .work import GB, Work


def free_bytes(device: torch.device) -> int:
    """Memory that this process could take: of a GPU what is free, of a host what it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Fit:
    """A model, its pages and one chunk's activations in so much memory."""

    work: Work
    geometry: PageGeometry
    chunk_tokens: int
    free: int

    def most_tokens_beside(self, prompt: int) -> int:
        """Tokens of KV cache that fit beside the weights and a prompt's activations."""
        return self._room(prompt) // self._bytes_per_page * PAGE_TOKENS

    def longest(self) -> int:
        """Tokens of the longest prompt and answer that fit; 0 where the weights leave no room."""
        few, many = 0, self.free // self._bytes_per_page
        while few < many:
            pages = -(-(few + many) // 2)
            if pages * PAGE_TOKENS <= self.most_tokens_beside(pages * PAGE_TOKENS):
                few = pages
            else:
                many = pages - 1
        return few * PAGE_TOKENS

    def check(self, tokens: int) -> None:
        """Refuse a KV cache of so many tokens where it does not fit.

        Raises:
            ConfigurationError: it does not, or not even the weights do; says what would.
        """
        weights, free = self.work.weight_bytes / GB, self.free / GB
        longest = self.longest()
        if longest == 0:
            raise ConfigurationError(
                f"the weights take {weights:.1f} GB and the device has {free:.1f} GB free, which "
                "leaves no room for a chunk and its KV pages; take a smaller --shape or a larger "
                "GPU"
            )
        if tokens > longest:
            pages = pages_for(tokens) * self._bytes_per_page / GB
            raise ConfigurationError(
                f"{tokens:,} tokens (prompt and answer) need {pages:.1f} GB of KV pages beside "
                f"{weights:.1f} GB of weights, and of {free:.1f} GB free {longest:,} tokens "
                f"would fit; {self._mends()}"
            )

    @property
    def _bytes_per_page(self) -> int:
        """With what prefill takes beside it."""
        scratch = self.geometry.scratch_bytes_per_page(self.work.itemsize)
        return self.geometry.bytes_per_page + scratch

    def _room(self, tokens: int) -> int:
        taken = self.work.weight_bytes + self.work.activation_bytes(tokens, self.chunk_tokens)
        return self.free - taken

    def _mends(self) -> str:
        mends = ["take fewer --tokens", "a smaller --chunk-tokens or --shape"]
        if self.geometry.dtype.itemsize > 1:
            mends.insert(1, "--kv-cache fp8, whose pages are half as large")
        return ", ".join(mends[:-1]) + f", or {mends[-1]}"
