"""One layer's KV pages of one sequence, as attention reads and writes them.

A page is 128 tokens, head-major: [kv_heads, 2 (K, V), 128, head_dim]. The layer's memory is
[pages, kv_heads, 2, 128, head_dim], and a block table says which page holds which tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .page_size import PAGE_TOKENS
from .transfer import without_waiting


class BlockTable:
    """`pages[p]` is the page of tokens [128 p, 128 (p + 1)), in every layer."""

    def __init__(self, pages: npt.NDArray[np.int64]) -> None:
        self._pages: npt.NDArray[np.int64] | None = pages
        self._on: dict[torch.device, Tensor] = {}

    @classmethod
    def of(cls, pages: Sequence[int]) -> "BlockTable":
        """From any sequence of page numbers."""
        return cls(np.asarray(pages, dtype=np.int64))

    @classmethod
    def where_it_lies(cls, table: Tensor) -> "BlockTable":
        """One that someone else keeps on a device, int32 [n]; more pages may follow those in use.

        Kernels read it there; nothing waits for the device unless `pages` are asked for.
        """
        made = cls(np.empty(0, dtype=np.int64))
        made._pages = None
        made._on[table.device] = table
        return made

    @property
    def pages(self) -> npt.NDArray[np.int64]:
        """The numbers, on the host."""
        if self._pages is None:
            [table] = self._on.values()
            self._pages = table.cpu().numpy().astype(np.int64)
        return self._pages

    def on(self, device: torch.device) -> Tensor:
        """int32 [pages] on a device; copied there once."""
        if device not in self._on:
            table = torch.from_numpy(self.pages.astype(np.int32))
            self._on[device] = without_waiting(table, device)
        return self._on[device]


@dataclass(frozen=True)
class LayerPages:
    """One layer's memory, and the table of a sequence. Keys lie rotated.

    Pages of 8 bits have scales (see `quantized`), and are read in float32; others in the type
    `read_as`, if it is given, and else in their own. Kernels for GPUs, which are given the memory
    itself, want it in the queries' type.
    """

    memory: Tensor  # [pages, kv_heads, 2, 128, head_dim]
    table: BlockTable
    scales: Tensor | None = None  # float32 [pages, kv_heads, 2]
    read_as: torch.dtype | None = None

    @classmethod
    def of(cls, memory: Tensor, block_table: Sequence[int]) -> "LayerPages":
        """From any sequence of page numbers."""
        return cls(memory, BlockTable.of(block_table))

    @property
    def dtype(self) -> torch.dtype:
        """In which K and V are read."""
        return torch.float32 if self.scales is not None else self.read_as or self.memory.dtype

    @property
    def num_kv_heads(self) -> int:
        """KV heads in the memory."""
        return self.memory.shape[1]

    def read(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """K and V of tokens [start, end): contiguous copies, each [kv_heads, end - start, d]."""
        first, last = start // PAGE_TOKENS, -(-end // PAGE_TOKENS)
        pages = self._pages(first, last)
        offset = start - first * PAGE_TOKENS
        heads, head_dim = self.num_kv_heads, self.memory.shape[-1]
        k, v = (
            pages[:, :, which]  # [pages, kv_heads, 128, d]
            .transpose(0, 1)
            .to(self.dtype, memory_format=torch.contiguous_format)
            .reshape(heads, -1, head_dim)[:, offset : offset + end - start]
            for which in (0, 1)
        )
        return k, v

    def read_into(self, scratch: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """K and V of tokens [start, end) in the scratch's type: views of it, [kv_heads, n, d] each.

        One pass, and no fresh memory, where `read` would be followed by a conversion.

        Args:
            scratch: [2, kv_heads, pages, 128, d] with room for every page that is touched.
        """
        first, last = start // PAGE_TOKENS, -(-end // PAGE_TOKENS)
        used = scratch[:, :, : last - first]
        used.copy_(self._pages(first, last).permute(2, 1, 0, 3, 4))
        offset = start - first * PAGE_TOKENS
        k, v = used.flatten(2, 3)[:, :, offset : offset + end - start].unbind(0)
        return k, v

    def read_keys(self, kv_head: int, start: int, end: int) -> Tensor:
        """K of one head, [end - start, d]."""
        first, last = start // PAGE_TOKENS, -(-end // PAGE_TOKENS)
        keys = self._pages(first, last)[:, kv_head, 0].to(self.dtype)
        offset = start - first * PAGE_TOKENS
        return keys.reshape(-1, self.memory.shape[-1])[offset : offset + end - start]

    def key_rows(self, kv_head: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where K of tokens of one head lies among the memory's rows of d; V is a page behind."""
        planes = (self.table.pages[tokens // PAGE_TOKENS] * self.num_kv_heads + kv_head) * 2
        return planes * PAGE_TOKENS + tokens % PAGE_TOKENS

    def gather(self, kv_head: int, tokens: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """K and V of chosen tokens of one head, each [len(tokens), d]."""
        flat = self.memory.view(-1, self.memory.shape[-1])
        index = torch.from_numpy(self.key_rows(kv_head, tokens)).to(flat.device)
        k, v = flat.index_select(0, index), flat.index_select(0, index + PAGE_TOKENS)
        if self.scales is None:
            return k.to(self.dtype), v.to(self.dtype)
        pages = torch.from_numpy(self.table.pages[tokens // PAGE_TOKENS]).to(flat.device)
        own = self.scales[pages, kv_head]
        return k.float() * own[:, :1], v.float() * own[:, 1:]

    def _pages(self, first: int, last: int) -> Tensor:
        """Pages [first, last) of the sequence; a view where they are neighbours in memory."""
        pages = self.table.pages[first:last]
        if self.scales is not None:
            index = torch.from_numpy(pages).to(self.memory.device)
            return self.memory[index].float() * self.scales[index][..., None, None]
        if pages[-1] - pages[0] == len(pages) - 1 and (np.diff(pages) == 1).all():
            return self.memory[int(pages[0]) : int(pages[-1]) + 1]
        return self.memory.index_select(0, torch.from_numpy(pages).to(self.memory.device))


def check_pages(memory: Tensor, pages_apart: bool = False) -> None:
    """Refuse memory that kernels, which count from its first element, would misread.

    Args:
        memory: one layer's pages.
        pages_apart: whether the kernel is told how far apart pages are, and so takes a view of
            some of the KV heads.

    Raises:
        ValueError: it is not [pages, kv_heads, 2, 128, d], or elements are not where they should.
    """
    if memory.ndim != 5 or memory.shape[2:4] != (2, PAGE_TOKENS):
        raise ValueError(
            f"pages must be [pages, kv_heads, 2, {PAGE_TOKENS}, d], not {list(memory.shape)}"
        )
    part = memory[:1] if pages_apart else memory
    if not part.is_contiguous():
        raise ValueError(
            f"pages of strides {memory.stride()} are not contiguous, and kernels count on it; "
            "pass one layer of a pool, or a contiguous copy"
        )


def as_tiles(memory: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Pages [pages, kv_heads, 2, 128, d] as rows of d, read 128 at a time.

    Returns:
        shape, strides and tile of a tensor descriptor.

    Raises:
        ValueError: as `check_pages`.
    """
    check_pages(memory)
    head_dim = memory.shape[-1]
    return [memory.numel() // head_dim, head_dim], [head_dim, 1], [PAGE_TOKENS, head_dim]


def write_pages(
    memory: Tensor,
    block_table: Sequence[int] | npt.NDArray[np.int64],
    start: int,
    k: Tensor,
    v: Tensor,
) -> None:
    """Write K and V of tokens [start, start + n), each [n, kv_heads, d], into one layer's memory.

    Args:
        memory: [pages, kv_heads, 2, 128, d].
        block_table: pages of the sequence from its beginning.
    """
    row, count = 0, k.shape[0]
    while row < count:
        page, offset = divmod(start + row, PAGE_TOKENS)
        rows = min(PAGE_TOKENS - offset, count - row)
        target = memory[block_table[page], :, :, offset : offset + rows]  # [kv_heads, 2, rows, d]
        target[:, 0] = k[row : row + rows].transpose(0, 1)
        target[:, 1] = v[row : row + rows].transpose(0, 1)
        row += rows


def to_pages(k: Tensor, v: Tensor) -> Tensor:
    """K and V of whole blocks as pages: [n, kv_heads, d] twice to [pages, kv_heads, 2, 128, d].

    The last block may be short; its page is filled up with zeros.
    """
    rows, heads, head_dim = k.shape
    num_pages = -(-rows // PAGE_TOKENS)
    pages = k.new_zeros(num_pages, PAGE_TOKENS, 2, heads, head_dim)
    flat = pages.view(num_pages * PAGE_TOKENS, 2, heads, head_dim)
    flat[:rows, 0] = k
    flat[:rows, 1] = v
    return pages.permute(0, 3, 2, 1, 4).contiguous()
