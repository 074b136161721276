"""What a model takes of one device's memory, counted before anything is allocated.

Estimates are upper ones: what is said to fit does, and what is refused might just have fitted.
"""

import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from ...kernels.page_size import PAGE_TOKENS, pages_for
from ..errors import DoesNotFitError, MemoryNeeds, Phase
from ..kv.pages import PageGeometry
from ..model.config import ModelConfig, WeightFormat
from ..model.heads import RankHeads

_RESERVE_BYTES = 1 << 30
"""The driver's context, workspaces of the libraries, and what fragmentation loses."""
_TABLE_ENTRY_BYTES = 4
_COMMUNICATOR_BYTES = 1 << 30
"""NCCL's, of each axis of a mesh that has several ranks: 0.89 GB of two H100s were measured."""
WINDOW_TOKENS = 32768
"""Rows that one selection is for, as published. Said here, as `prefill` stands on this room."""
_FULL_ROWS, _PIECES = 256, 16
"""At most so many rows attend in full, to keys in so many pieces whose results are merged."""
_SCALE_BYTES = 4
_SAMPLING_BYTES = 14
"""For each token of the vocabulary: bias, count, whether it was seen, mask; adjusted logits."""
_MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
"""Of a layer's four products, each by the name of what is in it; others in it are kept alike."""


def most_windows(prompt: int, chunk: int) -> int:
    """Of any chunk of a prompt: chunks begin at multiples of their size, and windows of theirs."""
    if prompt <= chunk:
        return -(-prompt // WINDOW_TOKENS)
    furthest = WINDOW_TOKENS - math.gcd(chunk, WINDOW_TOKENS)
    return -(-(furthest + chunk) // WINDOW_TOKENS)


def free_bytes(device: torch.device) -> int:
    """Memory that this process could allocate: of a GPU what is free, of a host what it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Weights:
    """The matrices of one tensor rank, in numbers of `itemsize` bytes, or of one where `kept` so.

    Norms and biases are nothing beside them.
    """

    config: ModelConfig
    itemsize: int = 2
    tensor_parallel: int = 1
    kept: WeightFormat = "auto"

    @property
    def heads(self) -> RankHeads:
        """Those of the first rank; the others have as many.

        Raises:
            TensorParallelError: the ranks do not divide the model.
        """
        return RankHeads.of(self.config, self.tensor_parallel, 0)

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
    def narrow(self) -> bool:
        """Whether layers are kept in 8 bits, as far as they can be."""
        return self.kept == "fp8" or self.config.quantization is not None

    @property
    def layers_bytes(self) -> int:
        """Of all layers' matrices, with their scales."""
        return sum(
            outputs * (inputs + _SCALE_BYTES)
            if self.config.keeps_narrow(f"model.layers.{layer}.{module}", self.kept)
            else outputs * inputs * self.itemsize
            for layer in range(self.config.num_layers)
            for module, (outputs, inputs) in zip(_MODULES, self.products, strict=True)
        )

    @property
    def num_bytes(self) -> int:
        """Of layers, and of this rank's part of embedding and head."""
        config = self.config
        tables = 1 if config.tie_word_embeddings else 2
        tokens = -(-config.vocab_size // self.tensor_parallel)
        return self.layers_bytes + tables * tokens * config.hidden_size * self.itemsize

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
class Fit(ABC):
    """A model's weights, its pages, and what is computed on them, in so much free memory.

    `processes` like this one look at the same memory before any of them allocates its own.
    """

    phase: ClassVar[Phase]

    weights: Weights
    geometry: PageGeometry
    free: int
    processes: int = field(default=1, kw_only=True)

    @property
    def own_free(self) -> int:
        """Bytes of the free memory that are this process's."""
        return self.free // self.processes

    @abstractmethod
    def computing_bytes(self, prompt: int) -> int:
        """Bytes that computing takes beside weights and pages, for prompts of so many tokens."""

    @property
    @abstractmethod
    def bytes_per_page(self) -> int:
        """Of one page, with what computing takes for each."""

    def largest_cache_beside(self, prompt: int) -> int:
        """Tokens of KV cache that fit where the longest prompt has so many."""
        left = self.own_free - self.weights.num_bytes - self.computing_bytes(prompt)
        return left // self.bytes_per_page * PAGE_TOKENS

    def largest_cache(self, prompt: int | None = None) -> int:
        """Most tokens of KV cache that fit, 0 where there is no room for any.

        Args:
            prompt: no prompt has more; None where one may fill the cache.
        """
        few, many = 0, self.own_free // self.bytes_per_page
        while few < many:
            pages = -(-(few + many) // 2)
            tokens = pages * PAGE_TOKENS
            if tokens <= self.largest_cache_beside(min(tokens, prompt or tokens)):
                few = pages
            else:
                many = pages - 1
        return few * PAGE_TOKENS

    def check(self, tokens: int, prompt: int | None = None) -> None:
        """Refuse a KV cache of so many tokens where it does not fit; `prompt` as above.

        Raises:
            DoesNotFitError: it does not, or not even the weights do.
        """
        largest = self.largest_cache(prompt)
        if largest == 0 or pages_for(tokens) * PAGE_TOKENS > largest:
            raise DoesNotFitError(self.needs(tokens, prompt), largest)

    def needs(self, tokens: int, prompt: int | None = None) -> MemoryNeeds:
        """What a KV cache of so many tokens takes with all else; `prompt` as above."""
        return MemoryNeeds(
            phase=self.phase,
            cache_tokens=tokens,
            cache_bytes=pages_for(tokens) * self.bytes_per_page,
            weight_bytes=self.weights.num_bytes,
            computing_bytes=self.computing_bytes(min(tokens, prompt or tokens)),
            free_bytes=self.own_free,
            processes=self.processes,
            quantized=self.geometry.quantized,
            narrow=self.weights.narrow,
        )

    def _bytes_of_a_layer(self, pages: int) -> int:
        """Of so many pages in one layer, as they travel."""
        return pages * self.geometry.bytes_per_page // self.geometry.num_layers


@dataclass(frozen=True)
class PrefillFit(Fit):
    """Of one rank of a mesh, which computes its part of a chunk's rows.

    Prompts of more than `selects_above` tokens are prefilled sparsely; None where none are. Where
    `gathers_pages`, a layer's pages are brought together on the device before they are sent.
    """

    phase = "prefill"

    chunk_tokens: int
    sequence_parallel: int = 1
    selects_above: int | None = None
    gathers_pages: bool = False

    def fewest_sequence_ranks(self, tokens: int, prompt: int | None = None) -> int:
        """So many are enough: with fewer, each one's part of a chunk would not fit beside the rest.

        Args:
            tokens: of KV cache, and `prompt`, as in `largest_cache`.
        """
        wanted = pages_for(tokens) * PAGE_TOKENS
        fewer = (
            ranks
            for ranks in range(1, self.sequence_parallel)
            if replace(self, sequence_parallel=ranks).largest_cache(prompt) >= wanted
        )
        return next(fewer, self.sequence_parallel)

    def computing_bytes(self, prompt: int) -> int:
        """A chunk's activations, selection's sums, pages on their way, communicators, the reserve.

        On their way are those of one prompt. More prompts that wait to be sent are the reserve's.
        """
        chunk, heads = min(prompt, self.chunk_tokens), self.weights.heads
        own_blocks = -(-pages_for(chunk) // self.sequence_parallel)
        rows = min(chunk, own_blocks * PAGE_TOKENS)
        # K and V of all ranks' rows, as they come and, of uneven parts, those that are wanted.
        token = 2 * heads.num_kv_heads * self.geometry.head_dim * self.weights.itemsize
        gathered = 2 * chunk * token if self.sequence_parallel > 1 else 0
        selects = self.selects_above is not None and prompt > self.selects_above
        selection = self._selection_bytes(prompt) if selects else 0
        sent = self._bytes_of_a_layer(own_blocks) if self.gathers_pages else 0
        axes = (self.weights.tensor_parallel, self.sequence_parallel)
        communicators = _COMMUNICATOR_BYTES * sum(ranks > 1 for ranks in axes)
        activations = rows * self.weights.row_bytes
        return activations + gathered + selection + sent + communicators + _RESERVE_BYTES

    def _selection_bytes(self, prompt: int) -> int:
        """Sums over a rank's part of the keys, for each window; or the last rows' full attention.

        They are not alive at the same time, but allocated anew for every layer.
        """
        heads, head_dim = self.weights.heads.num_heads, self.geometry.head_dim
        windows = most_windows(prompt, self.chunk_tokens)
        keys = -(-prompt // self.sequence_parallel)
        sums = 6 * 4 * heads * keys * windows
        # As they are made, as they come from all ranks, in order, and weighed.
        pieces = 4 * 4 * _PIECES * _FULL_ROWS * heads * (head_dim + 1)
        return max(sums, pieces)

    @property
    def bytes_per_page(self) -> int:
        """With the memory that pages of 8 bits are widened into."""
        scratch = self.geometry.scratch_bytes_per_page(self.weights.itemsize)
        return self.geometry.bytes_per_page + scratch


@dataclass(frozen=True)
class DecodeFit(Fit):
    """Of a decoder, or of one rank of it, which prepares steps of up to `max_batch` sequences.

    `chunk_tokens` are prefill's: pages of one layer come for so many tokens at once.
    `prompt_tokens` of prompts that it computes itself are in the largest step. Logits of
    `logits_rows` rows are kept, of all steps that are prepared.
    """

    phase = "decode"

    max_batch: int
    chunk_tokens: int
    logits_rows: int
    prompt_tokens: int = 0

    def computing_bytes(self, prompt: int) -> int:
        """The largest step, all logits and what is drawn by, pages as they come, a communicator,
        the reserve."""
        vocab_size = self.weights.config.vocab_size
        several = self.weights.tensor_parallel > 1
        # As they come from all ranks, and in order.
        logits = vocab_size * self.logits_rows * self.weights.itemsize * (2 if several else 1)
        logits += vocab_size * self.max_batch * _SAMPLING_BYTES
        come = self._bytes_of_a_layer(pages_for(min(prompt, self.chunk_tokens)))
        rows = self.max_batch + self.prompt_tokens
        communicator = _COMMUNICATOR_BYTES if several else 0
        return rows * self.weights.row_bytes + logits + come + communicator + _RESERVE_BYTES

    @property
    def bytes_per_page(self) -> int:
        """With its entry in every sequence's block table."""
        return self.geometry.bytes_per_page + self.max_batch * _TABLE_ENTRY_BYTES
