"""KV pages: the memory, and who owns which page.

A page holds 128 tokens of one layer, head-major:

    pool.memory  [layers, pages, kv_heads, 2 (K, V), 128, head_dim]
    pool.scales  [layers, pages, kv_heads, 2] for pages of 8 bits; see `kernels.quantized`

Keys lie rotated at their own position within their dual chunk; see `kernels.dual_chunk`.
Page p of a sequence holds its tokens [128 p, 128 (p + 1)) in every layer, so one block table
serves all layers.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels.page_size import PAGE_TOKENS
from ...kernels.transfer import without_waiting
from ..errors import OutOfPagesError, PageFormatError, TransferError
from .formats import KVCacheDtype, dtype_name

_SCALE_BYTES = 4
_FORMATS = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class PageGeometry:
    """The shape of one rank's pages: `num_kv_heads` counts the heads held on this rank."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def quantized(self) -> bool:
        """Whether pages hold e4m3 values, with scales beside them."""
        return self.dtype == torch.float8_e4m3fn

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page in all layers, its scales included."""
        planes = self.num_layers * self.num_kv_heads * 2
        scales = _SCALE_BYTES if self.quantized else 0
        return planes * (PAGE_TOKENS * self.head_dim * self.dtype.itemsize + scales)

    def scratch_bytes_per_page(self, itemsize: int) -> int:
        """Bytes that prefill takes beside each page: one layer of it in numbers of `itemsize`.

        0 where attention reads pages as they are.
        """
        numbers = self.num_kv_heads * 2 * PAGE_TOKENS * self.head_dim
        return numbers * itemsize if self.quantized else 0

    def kept_as(self, kv_cache_dtype: KVCacheDtype) -> "PageGeometry":
        """The same pages in another format; "auto" keeps the model's type."""
        if kv_cache_dtype == "auto":
            return self
        return replace(self, dtype=_FORMATS[kv_cache_dtype])


def movable(values: Tensor) -> Tensor:
    """The same in a type that can be moved: index functions do not take every 8-bit one."""
    return values.view(torch.uint8) if values.itemsize == 1 else values


PageIndex = slice | Tensor
"""What picks pages out of a layer's memory: a slice where they are neighbours, else int64 [n]."""


@dataclass(frozen=True, eq=False)
class Pages:
    """K and V of some pages of one layer: what a pool has of it, or what travels.

    `values` are [n, kv_heads, 2, 128, head_dim]. Pages of 8 bits have `scales`, float32
    [n, kv_heads, 2]; see `kernels.quantized`.
    """

    values: Tensor
    scales: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes, scales included."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def bits(self) -> Tensor:
        """The values in a type that can be moved."""
        return movable(self.values)

    def at(self, index: PageIndex) -> "Pages":
        """Some of them: a view for a slice, else a copy."""
        scales = None if self.scales is None else self.scales[index]
        return Pages(self.bits[index].view(self.values.dtype), scales)

    def heads(self, first: int, count: int) -> "Pages":
        """A view of some KV heads."""
        own = slice(first, first + count)
        return Pages(self.values[:, own], None if self.scales is None else self.scales[:, own])

    def check_format(self, others: "Pages") -> None:
        """Return if others can be copied over some of these.

        Raises:
            PageFormatError: they are of another format.
        """
        kept, came = self.values.dtype, others.values.dtype
        if kept != came or (self.scales is None) != (others.scales is None):
            raise PageFormatError(dtype_name(came), dtype_name(kept))

    def on(self, device: torch.device) -> "Pages":
        """The same on a device."""
        scales = None if self.scales is None else self.scales.to(device)
        return Pages(self.values.to(device), scales)


@dataclass(frozen=True, eq=False)
class HeldPages:
    """Pages of one layer that lie in a pool and stay as they are for as long as they are held.

    `numbers` are theirs in the pool, int64 [n], and `index` picks them. `kv_heads` are those of the
    pool that `layer` has; None: all of them.
    """

    layer: Pages
    numbers: npt.NDArray[np.int64]
    index: PageIndex
    kv_heads: range | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def nbytes(self) -> int:
        """Bytes that lie in them, scales included."""
        return len(self) * self.layer.nbytes // len(self.layer)

    def heads(self, first: int, count: int) -> "HeldPages":
        """A view of some of their KV heads."""
        before = 0 if self.kv_heads is None else self.kv_heads.start
        own = range(before + first, before + first + count)
        return replace(self, layer=self.layer.heads(first, count), kv_heads=own)

    def read(self) -> Pages:
        """What is in them: a view where they are neighbours, else a copy."""
        return self.layer.at(self.index)

    def write(self, pages: Pages) -> None:
        """Put others into their place, on whichever device these are.

        Raises:
            PageFormatError: they are of another format.
            TransferError: they do not fit in.
        """
        target = self.layer
        target.check_format(pages)
        if (len(pages), *target.values.shape[1:]) != (len(self), *pages.values.shape[1:]):
            raise TransferError(f"pages of shape {tuple(pages.values.shape)} do not fit in")
        pages = pages.on(target.values.device)
        target.bits[self.index] = pages.bits
        if target.scales is not None and pages.scales is not None:
            target.scales[self.index] = pages.scales


@dataclass(frozen=True, eq=False)
class SetAside:
    """What some pages hold in all layers, on the host: `values` and `scales` as a pool's."""

    values: Tensor
    scales: Tensor | None

    def __len__(self) -> int:
        return self.values.shape[1]


class PageMemory(ABC):
    """Where the pages of one process lie, whoever allocated them and knows which are free.

    `geometry` is theirs, and `device` what they lie on.
    """

    geometry: PageGeometry
    device: torch.device

    @property
    @abstractmethod
    def slabs(self) -> tuple[Tensor, ...]:
        """All of the memory: tensors of consecutive layers, in order.

        Each is [layers, pages, kv_heads, 2, 128, head_dim], and contiguous.
        """

    @property
    @abstractmethod
    def scale_slabs(self) -> tuple[Tensor, ...]:
        """In the same way, of pages of 8 bits: [layers, pages, kv_heads, 2]; else none."""

    @abstractmethod
    def layer(self, layer: int) -> Pages:
        """A view of all pages of one layer."""

    def held(self, layer: int, numbers: npt.NDArray[np.int64]) -> HeldPages:
        """Some pages of one layer, which someone holds."""
        return HeldPages(self.layer(layer), numbers, page_index(numbers, self.device))

    def put(self, layer: int, table: Tensor, first_kv_head: int, pages: Pages) -> None:
        """Copy whole pages in.

        Args:
            table: int64 [n] on the memory's device, where each goes.
            first_kv_head: of this memory, the first one of `pages`.
            pages: on any device.

        Raises:
            PageFormatError: they are of another format.
            TransferError: they do not fit in.
        """
        values, whole = pages.values, self.layer(layer)
        whole.check_format(pages)
        target = whole.heads(first_kv_head, values.shape[1])
        if len(table) != len(pages) or target.values.shape[1:] != values.shape[1:]:
            raise TransferError(f"pages of shape {tuple(values.shape)} do not fit in")
        pages = pages.on(self.device)
        target.bits.index_copy_(0, table, pages.bits)
        if pages.scales is not None and target.scales is not None:
            target.scales.index_copy_(0, table, pages.scales)


class PagePool(PageMemory):
    """Page memory of one process, and a reference count for each page.

    A page is free when nobody holds it. Shared pages (several choices of one prompt) are held
    once by each sequence. Not thread-safe: one thread allocates and releases; other threads may
    write pages that are held.
    """

    def __init__(self, geometry: PageGeometry, num_pages: int, device: torch.device) -> None:
        self.geometry = geometry
        self.num_pages = num_pages
        self.memory = torch.empty(
            geometry.num_layers, num_pages, geometry.num_kv_heads, 2, PAGE_TOKENS,
            geometry.head_dim, dtype=geometry.dtype, device=device,
        )  # fmt: skip
        self.scales = (
            torch.empty(self.memory.shape[:4], dtype=torch.float32, device=device)
            if geometry.quantized
            else None
        )
        # With its index, where one was named without.
        self.device = self.memory.device
        self._holders = [0] * num_pages
        self._free = num_pages

    @property
    def slabs(self) -> tuple[Tensor, ...]:
        return (self.memory,)

    @property
    def scale_slabs(self) -> tuple[Tensor, ...]:
        return () if self.scales is None else (self.scales,)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self._free

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, each held once, in the longest consecutive runs to be had.

        Consecutive pages can be read as one view instead of being gathered.

        Raises:
            OutOfPagesError: fewer than `count` pages are free; none was taken.
        """
        if count > self._free:
            raise OutOfPagesError(count, self._free, self.num_pages)
        pages: list[int] = []
        for start, end in sorted(self._free_runs(), key=_fitting_first(count)):
            taken = range(start, min(end, start + count - len(pages)))
            pages.extend(taken)
            if len(pages) == count:
                break
        for page in pages:
            self._holders[page] = 1
        self._free -= count
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Hold pages that are already held, once more each.

        Raises:
            ValueError: one of them is free; none was taken.
        """
        for page in pages:
            if self._holders[page] == 0:
                raise ValueError(f"page {page} is free and cannot be shared")
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Let go of pages, once each; a page nobody holds any more is free."""
        for page in pages:
            if self._holders[page] == 0:
                raise ValueError(f"page {page} was released more often than it was held")
            self._holders[page] -= 1
            self._free += self._holders[page] == 0

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page in every layer."""
        self.memory[:, target].copy_(self.memory[:, source])
        if self.scales is not None:
            self.scales[:, target] = self.scales[:, source]

    def set_aside(self, pages: Sequence[int]) -> SetAside:
        """Copy pages to the host, to be brought back or forgotten."""
        index = torch.tensor(pages, device=self.memory.device)
        values = movable(self.memory).index_select(1, index).cpu()
        scales = None if self.scales is None else self.scales.index_select(1, index).cpu()
        return SetAside(values, scales)

    def bring_back(self, aside: SetAside, pages: Sequence[int]) -> None:
        """Put what was set aside into as many pages, perhaps others; once."""
        index = torch.tensor(pages, device=self.memory.device)
        movable(self.memory).index_copy_(1, index, aside.values.to(self.memory.device))
        if self.scales is not None and aside.scales is not None:
            self.scales.index_copy_(1, index, aside.scales.to(self.memory.device))

    def forget(self, aside: SetAside) -> None:
        """What was set aside is not brought back."""

    def layer(self, layer: int) -> Pages:
        return Pages(self.memory[layer], self.layer_scales(layer))

    def layer_scales(self, layer: int) -> Tensor | None:
        """float32 [pages, kv_heads, 2] of one layer, where pages are of 8 bits."""
        return None if self.scales is None else self.scales[layer]

    def put_whole(self, layer: int, table: Tensor, pages: Pages) -> None:
        """As `put`, of all KV heads and in the pool's own format."""
        target = self.layer(layer)
        # Eight bytes at a time: index functions move elements, however small.
        whole, own = (each.values.flatten(1).view(torch.int64) for each in (target, pages))
        whole.index_copy_(0, table, own)
        if pages.scales is not None and target.scales is not None:
            target.scales.index_copy_(0, table, pages.scales)

    def clear(self) -> None:
        """Fill all pages with zeros."""
        self.memory.zero_()
        if self.scales is not None:
            self.scales.fill_(1.0)

    def _free_runs(self) -> list[tuple[int, int]]:
        """Maximal half-open ranges [start, end) of free pages."""
        runs: list[tuple[int, int]] = []
        start = None
        for page, holders in enumerate([*self._holders, 1]):
            if holders == 0 and start is None:
                start = page
            elif holders and start is not None:
                runs.append((start, page))
                start = None
        return runs


def _fitting_first(count: int):
    """Sort key: the shortest run that fits everything first, else the longest runs first."""

    def key(run: tuple[int, int]) -> tuple[bool, int]:
        length = run[1] - run[0]
        return (length < count, length if length >= count else -length)

    return key


def page_index(pages: npt.NDArray[np.int64], device: torch.device) -> PageIndex:
    """What picks these pages out of memory on a device."""
    if (np.diff(pages) == 1).all():
        first = int(pages[0]) if len(pages) else 0
        return slice(first, first + len(pages))
    return without_waiting(torch.from_numpy(pages), device)
