"""What a model takes of one device's memory, counted before anything is taken.

Estimates are upper ones: what is said to fit does, and what is refused might just have fitted.
"""

import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ...kernels.page_size import PAGE_TOKENS, pages_for
from ..errors import ConfigurationError, LongreachError, OutOfMemoryError
from ..kv.pages import PageGeometry
from ..model.config import ModelConfig
from ..model.qwen2 import HeadShare

GB = 1e9
_RESERVE_BYTES = 1 << 30
"""The driver's context, workspaces of the libraries, and what fragmentation loses."""
_TABLE_ENTRY_BYTES = 4
_SAYS_SO = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What errors say that come from beside PyTorch's allocator: CUDA itself, Triton, and cuBLAS."""


def free_bytes(device: torch.device) -> int:
    """Memory that this process could take: of a GPU what is free, of a host what it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def out_of_memory_raises(error: LongreachError) -> Iterator[None]:
    """Raise `error` where the device's memory does not suffice for what is done within.

    Whoever keeps the error does not keep with it what was taken by calls that are over.
    """
    try:
        yield
    except Exception as cause:
        if not _is_out_of_memory(cause):
            raise
        traceback.clear_frames(cause.__traceback__)
        raise error from cause


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _SAYS_SO)


def decode_ran_out(when: str) -> str:
    """What a decode worker says that ran out of memory at something."""
    return (
        f"the decode worker ran out of memory {when}; lower decode.max_batch or "
        "decode.kv_cache_tokens"
    )


@dataclass(frozen=True)
class Weights:
    """The matrices of one tensor rank, in numbers of `itemsize` bytes.

    Norms and biases are nothing beside them.
    """

    config: ModelConfig
    itemsize: int = 2
    tensor_parallel: int = 1

    @property
    def heads(self) -> HeadShare:
        """Those of the first rank; the others have as many.

        Raises:
            ConfigurationError: the ranks do not divide the model.
        """
        return HeadShare.of(self.config, self.tensor_parallel, 0)

    @property
    def products(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of a layer's four products: QKV, output, gate and up, down."""
        config, heads = self.config, self.heads
        hidden, middle = config.hidden_size, config.intermediate_size // self.tensor_parallel
        width, kv_width = (n * config.head_dim for n in (heads.num_heads, heads.num_kv_heads))
        return [
            (width + 2 * kv_width, hidden),
            (hidden, width),
            (2 * middle, hidden),
            (hidden, middle),
        ]

    @property
    def layer_elements(self) -> int:
        """Elements of one layer's matrices."""
        return sum(outputs * inputs for outputs, inputs in self.products)

    @property
    def num_bytes(self) -> int:
        """Of layers, embedding and head; the last two are whole on every rank."""
        config = self.config
        tables = 1 if config.tie_word_embeddings else 2
        elements = config.num_layers * self.layer_elements
        return (elements + tables * config.vocab_size * config.hidden_size) * self.itemsize

    @property
    def row_bytes(self) -> int:
        """About what one token takes at once on its way through a layer.

        It is alive as hidden states, some of them in float32, as queries in three rotations, and
        within the MLP.
        """
        config = self.config
        width, middle = self.heads.num_heads * config.head_dim, config.intermediate_size
        numbers = 4 * middle // self.tensor_parallel + 8 * config.hidden_size + 4 * width
        return numbers * self.itemsize


@dataclass(frozen=True)
class Mends:
    """What helps where memory does not suffice, in the words of whoever set the sizes.

    `tokens` is the setting of how many the pages hold, `narrow` the one that makes pages of 8 bits.
    Each of `others` can follow on "take".
    """

    tokens: str
    narrow: str
    others: tuple[str, ...]

    def of_pages(self, narrow: bool) -> str:
        """What makes room for pages, which may be `narrow` already."""
        shrinks = () if narrow else (f"{self.narrow}, whose pages are half as large",)
        return _any_of(f"fewer {self.tokens}", *shrinks, *self.others)

    def of_all_else(self) -> str:
        """What makes room for the weights."""
        return _any_of(*self.others)


@dataclass(frozen=True)
class Fit(ABC):
    """A model's weights, its pages, and what is computed on them, in so much free memory.

    `sharing` processes like this one look at the same memory before any of them takes its own.
    """

    weights: Weights
    geometry: PageGeometry
    free: int
    mends: Mends
    sharing: int = field(default=1, kw_only=True)

    @property
    def share(self) -> int:
        """Bytes of the free memory that are this process's."""
        return self.free // self.sharing

    @abstractmethod
    def besides(self, prompt: int) -> int:
        """Bytes that computing takes beside weights and pages, for prompts of so many tokens."""

    @property
    @abstractmethod
    def bytes_per_page(self) -> int:
        """Of one page, with what computing takes for each."""

    def most_tokens_beside(self, prompt: int) -> int:
        """Tokens of KV cache that fit where the longest prompt has so many."""
        left = self.share - self.weights.num_bytes - self.besides(prompt)
        return left // self.bytes_per_page * PAGE_TOKENS

    def longest(self, prompt: int | None = None) -> int:
        """Most tokens of KV cache that fit, 0 where there is no room for any.

        Args:
            prompt: no prompt has more; None where one may fill the cache.
        """
        few, many = 0, self.share // self.bytes_per_page
        while few < many:
            pages = -(-(few + many) // 2)
            tokens = pages * PAGE_TOKENS
            if tokens <= self.most_tokens_beside(min(tokens, prompt or tokens)):
                few = pages
            else:
                many = pages - 1
        return few * PAGE_TOKENS

    def check(self, tokens: int, prompt: int | None = None) -> None:
        """Refuse a KV cache of so many tokens where it does not fit; `prompt` as in `longest`.

        Raises:
            ConfigurationError: it does not, or not even the weights do; says what would.
        """
        longest = self.longest(prompt)
        if longest == 0:
            raise ConfigurationError(
                f"the weights take {self.weights.num_bytes / GB:.1f} GB and the device has "
                f"{self.share / GB:.1f} GB free{self._each}, which leaves no room for KV pages "
                f"and for computing; {self.mends.of_all_else()}"
            )
        if pages_for(tokens) * PAGE_TOKENS > longest:
            raise ConfigurationError(
                f"{self._parts(tokens, prompt)}, and of {self.share / GB:.1f} GB free{self._each} "
                f"{longest:,} tokens would fit; {self._mends_of_pages()}"
            )

    def overrun(self, tokens: int, prompt: int | None = None) -> ConfigurationError:
        """What to say where the memory ran out all the same: others take from the same device."""
        return ConfigurationError(
            f"the device ran out of memory: {self._parts(tokens, prompt)}, and of "
            f"{self.share / GB:.1f} GB that were free{self._each} other processes may have taken a "
            f"part since; {self._mends_of_pages()}"
        )

    @property
    def _each(self) -> str:
        return f" for each of {self.sharing} processes" if self.sharing > 1 else ""

    def _parts(self, tokens: int, prompt: int | None) -> str:
        pages = pages_for(tokens) * self.bytes_per_page / GB
        besides = self.besides(min(tokens, prompt or tokens)) / GB
        return (
            f"{tokens:,} tokens ({self.mends.tokens}) need {pages:.1f} GB of KV pages beside "
            f"{self.weights.num_bytes / GB:.1f} GB of weights and up to {besides:.1f} GB for "
            "computing"
        )

    def _bytes_of_a_layer(self, pages: int) -> int:
        """Of so many pages in one layer, as they travel."""
        return pages * self.geometry.bytes_per_page // self.geometry.num_layers

    def _mends_of_pages(self) -> str:
        return self.mends.of_pages(narrow=self.geometry.quantized)


@dataclass(frozen=True)
class PrefillFit(Fit):
    """Of one rank of a mesh, which computes its share of a chunk's rows.

    Prompts of more than `selects_above` tokens are prefilled sparsely; None where none are. Where
    `gathers_pages`, a layer's pages are brought together on the device before they are sent.
    """

    chunk_tokens: int
    sequence_parallel: int = 1
    selects_above: int | None = None
    gathers_pages: bool = False

    def besides(self, prompt: int) -> int:
        """A chunk's activations, selection's sums over all keys, pages on their way, the reserve.

        On their way are those of one prompt. More prompts that wait to be sent are the reserve's.
        """
        chunk, heads = min(prompt, self.chunk_tokens), self.weights.heads
        own_blocks = -(-pages_for(chunk) // self.sequence_parallel)
        rows = min(chunk, own_blocks * PAGE_TOKENS)
        # K and V of all ranks' rows, as they come and as they are put in order.
        token = 2 * heads.num_kv_heads * self.geometry.head_dim * self.weights.itemsize
        gathered = 2 * chunk * token if self.sequence_parallel > 1 else 0
        selects = self.selects_above is not None and prompt > self.selects_above
        sums = 6 * 4 * heads.num_heads * prompt if selects else 0
        sent = self._bytes_of_a_layer(own_blocks) if self.gathers_pages else 0
        return rows * self.weights.row_bytes + gathered + sums + sent + _RESERVE_BYTES

    @property
    def bytes_per_page(self) -> int:
        """With the memory that pages of 8 bits are widened into."""
        scratch = self.geometry.scratch_bytes_per_page(self.weights.itemsize)
        return self.geometry.bytes_per_page + scratch


@dataclass(frozen=True)
class DecodeFit(Fit):
    """Of a decoder, which prepares steps of 1, 2, 4 and so on up to `max_batch` sequences.

    `chunk_tokens` are prefill's: pages of one layer come for so many tokens at once.
    """

    max_batch: int
    chunk_tokens: int

    def besides(self, prompt: int) -> int:
        """The largest step, the logits of all, pages as they come, and the reserve."""
        # All steps together have less than twice the rows of the largest.
        logits = 2 * self.weights.config.vocab_size * self.weights.itemsize
        come = self._bytes_of_a_layer(pages_for(min(prompt, self.chunk_tokens)))
        return self.max_batch * (self.weights.row_bytes + logits) + come + _RESERVE_BYTES

    @property
    def bytes_per_page(self) -> int:
        """With its entry in every sequence's block table."""
        return self.geometry.bytes_per_page + self.max_batch * _TABLE_ENTRY_BYTES


def _any_of(*mends: str) -> str:
    """As a list after "take"."""
    if len(mends) == 1:
        return f"take {mends[0]}"
    return f"take {', '.join(mends[:-1])}, or {mends[-1]}"
