"""Sparse attention of several query blocks at once, in plain PyTorch.

A block looks at a few hundred keys. On a CPU, products of that size take no longer than the calls
around them, and than fresh memory for what comes out. So blocks of one dual chunk are computed
together: columns are the same keys for all of them, and tiles at one distance are a batch of
products. What is in between lies in memory that is used again.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..dual_chunk.segments import BLOCK_ROWS, KeyBounds, SegmentQueries
from ..pages import LayerPages
from .selections import Selections
from .visible import VisibleKeys

_LOGIT_BYTES = 5 << 20
"""Of one batch and head: more would outgrow a CPU's caches."""
_COLUMNS_AT_ONCE = 32
"""Columns are filled up to a multiple: rows of logits that begin anywhere take longer to sum up."""


def can_batch(pages: LayerPages, stride: int | None) -> bool:
    """Whether tiles lie in one dual chunk each, and pages hold numbers as they are."""
    return pages.scales is None and (stride is None or stride % BLOCK_ROWS == 0)


def attend(
    queries: SegmentQueries,
    blocks: Sequence[int],
    pages: LayerPages,
    stride: int | None,
    scale: float,
    selections: Selections,
    output: Tensor,
    lse: Tensor,
) -> None:
    """As the package's `attention`, of the first rows of `queries`, which are whole blocks.

    Args:
        blocks: theirs, rising.
        output: [rows, heads, d], filled in; as is `lse`, float32 [rows, heads].
    """
    heads = output.shape[1]
    group = heads // pages.num_kv_heads
    keys = [_HeadKeys(selections, head, pages, head // group) for head in range(heads)]
    most = max(each.width for each in keys)
    size = max(1, _LOGIT_BYTES // (4 * BLOCK_ROWS * most))
    batches = list(_Batch.cut(np.asarray(blocks, dtype=np.int64), stride, size))
    scratch = _Scratch(max(len(batch.blocks) for batch in batches), keys, queries, pages)
    for batch in batches:
        rotated = scratch.widened(queries, batch)
        for head, each in enumerate(keys):
            logits = scratch.logits_of(batch, each)
            tile_rows = each.tile_rows(batch.blocks)
            _write_logits(
                logits, [of_segment[:, :, head] for of_segment in rotated], each, batch,
                scratch.tiles(tile_rows), scale * math.log2(math.e),
            )  # fmt: skip
            logits[:, :, each.first_tile : each.first_tile + BLOCK_ROWS].add_(scratch.causal)
            values = scratch.values(each.value_rows(tile_rows))
            flat = logits.flatten(0, 1)
            highest = flat.amax(-1, keepdim=True)
            weights = flat.sub_(highest).exp2_()
            total = weights.sum(-1, keepdim=True)
            narrow = scratch.narrowed(weights.mul_(total.reciprocal()))
            lse[batch.rows, head] = (highest + total.log2_())[:, 0] * math.log(2)
            attended = torch.bmm(narrow.view_as(logits), values)
            output[batch.rows, head] = attended.flatten(0, 1)


@dataclass(frozen=True)
class _Batch:
    """Query blocks of one dual chunk, whose first row is `first_row`.

    `bounds` are block numbers: where successive and where intra keys begin.
    """

    blocks: npt.NDArray[np.int64]
    first_row: int
    bounds: tuple[int, int]

    @property
    def rows(self) -> slice:
        """Among all rows."""
        return slice(self.first_row, self.first_row + len(self.blocks) * BLOCK_ROWS)

    @classmethod
    def cut(
        cls, blocks: npt.NDArray[np.int64], stride: int | None, size: int
    ) -> "Iterator[_Batch]":
        """All blocks, at most `size` at a time."""
        chunks = np.zeros_like(blocks) if stride is None else blocks * BLOCK_ROWS // stride
        borders = [0, *(np.flatnonzero(np.diff(chunks)) + 1).tolist(), len(blocks)]
        for start, end in itertools.pairwise(borders):
            bounds = KeyBounds.of(int(blocks[start]) * BLOCK_ROWS, stride)
            for first in range(start, end, size):
                yield cls(
                    blocks[first : min(first + size, end)],
                    first * BLOCK_ROWS,
                    (bounds.inter // BLOCK_ROWS, bounds.successive // BLOCK_ROWS),
                )


class _HeadKeys:
    """What one head selected. Logits have its columns first, and then its tiles, nearest first."""

    def __init__(self, selections: Selections, head: int, pages: LayerPages, kv_head: int) -> None:
        self.visible = VisibleKeys(selections, head)
        self._pages, self._kv_head = pages, kv_head
        columns = self.visible.columns
        self._column_rows = pages.key_rows(kv_head, columns)
        self.column_keys = pages.gather(kv_head, columns)[0].float()
        self.first_tile = -(-len(columns) // _COLUMNS_AT_ONCE) * _COLUMNS_AT_ONCE
        self.width = self.first_tile + self.num_tiles * BLOCK_ROWS

    @property
    def num_tiles(self) -> int:
        """Tiles of each block, those before the prompt included."""
        return len(self.visible.distances)

    def tile_rows(self, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows of memory at which keys of tiles begin, [tiles, blocks].

        Tiles before the prompt, that no block sees, are the first one.
        """
        tiles = np.maximum(blocks - self.visible.distances[:, None], 0)
        return self._pages.key_rows(self._kv_head, tiles * BLOCK_ROWS)

    def value_rows(self, tile_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows of memory that hold the values, [blocks, width]."""
        blocks = tile_rows.shape[1]
        rows = np.empty((blocks, self.width), dtype=np.int64)
        columns = len(self._column_rows)
        rows[:, :columns] = self._column_rows
        # Filling, whose weights are 0, is of any value that exists.
        rows[:, columns : self.first_tile] = tile_rows[0, :, None]
        in_tiles = tile_rows.T[:, :, None] + np.arange(BLOCK_ROWS)
        rows[:, self.first_tile :] = in_tiles.reshape(blocks, -1)
        return rows + BLOCK_ROWS  # values lie one tile behind their keys


class _Scratch:
    """Memory that batches use one after another."""

    def __init__(
        self,
        blocks: int,
        heads: Sequence[_HeadKeys],
        queries: SegmentQueries,
        pages: LayerPages,
    ) -> None:
        """For so many blocks at once."""
        device, self._pages = pages.memory.device, pages
        _, num_heads, head_dim = queries.intra.shape
        rows, most = blocks * BLOCK_ROWS, max(each.width for each in heads)
        tiles = blocks * max(each.num_tiles for each in heads)
        self._queries = torch.empty(3, rows, num_heads, head_dim, device=device)
        self._logits = torch.empty(rows * most, device=device)
        self._weights = torch.empty(rows * most, dtype=pages.dtype, device=device)
        self._held_tiles = pages.memory.new_empty(tiles, BLOCK_ROWS * head_dim)
        self._tiles = torch.empty(tiles, BLOCK_ROWS, head_dim, device=device)
        self._values = pages.memory.new_empty(blocks * most, head_dim)
        self._head_dim = head_dim
        never = torch.full((BLOCK_ROWS, BLOCK_ROWS), -torch.inf, device=device)
        self.causal = never.triu_(1)  # what is added to logits of a block's own tile

    def widened(self, queries: SegmentQueries, batch: _Batch) -> list[Tensor]:
        """The batch's inter, successive and intra queries in float32, [blocks, 128, heads, d].

        Those that no key is seen under are left out, and hold anything.
        """
        count = len(batch.blocks) * BLOCK_ROWS
        wanted = (batch.bounds[0] > 0, batch.bounds[1] > 0, True)
        rotated = (queries.inter, queries.successive, queries.intra)
        for target, is_wanted, each in zip(self._queries, wanted, rotated, strict=True):
            if is_wanted:
                target[:count].copy_(each[batch.rows])
        return [each[:count].unflatten(0, (-1, BLOCK_ROWS)) for each in self._queries]

    def logits_of(self, batch: _Batch, head: _HeadKeys) -> Tensor:
        """Room for them: [blocks, 128, width]."""
        shape = (len(batch.blocks), BLOCK_ROWS, head.width)
        return self._logits[: math.prod(shape)].view(shape)

    def tiles(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Keys of the tiles that begin there, [tiles, blocks], in float32: [*, *, 128, d]."""
        held = self._held_tiles[: rows.size]
        memory = self._pages.memory.view(-1, held.shape[1])
        index = torch.from_numpy(rows.ravel() // BLOCK_ROWS).to(memory.device)
        torch.index_select(memory, 0, index, out=held)
        tiles = self._tiles[: rows.size]
        tiles.copy_(held.view_as(tiles))
        return tiles.unflatten(0, rows.shape)

    def values(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Those that lie there, [blocks, width], as they are read: [*, *, d]."""
        memory = self._pages.memory.view(-1, self._head_dim)
        values = self._values[: rows.size]
        torch.index_select(memory, 0, torch.from_numpy(rows.ravel()).to(memory.device), out=values)
        return values.to(self._pages.dtype).unflatten(0, rows.shape)

    def narrowed(self, weights: Tensor) -> Tensor:
        """In the values' type."""
        if weights.dtype == self._weights.dtype:
            return weights
        return self._weights[: weights.numel()].view_as(weights).copy_(weights)


def _write_logits(
    logits: Tensor,
    rotated: Sequence[Tensor],
    head: _HeadKeys,
    batch: _Batch,
    tiles: Tensor,
    scale: float,
) -> None:
    """Logits of a batch's blocks, [blocks, 128, width], -inf where a block does not see a key.

    Args:
        rotated: inter, successive and intra queries, float32 [blocks, 128, d].
        tiles: keys, float32 [tiles, blocks, 128, d].
    """
    _write_columns(logits, rotated, head, batch, scale)
    for number, distance in enumerate(head.visible.distances.tolist()):
        first = head.first_tile + number * BLOCK_ROWS
        target = logits[:, :, first : first + BLOCK_ROWS]
        seen = batch.blocks - distance
        borders = [int(each) for each in np.searchsorted(seen, (0, *batch.bounds))]
        target[: borders[0]] = -torch.inf
        parts = itertools.pairwise((*borders, len(seen)))
        for queries, (start, end) in zip(rotated, parts, strict=True):
            if start < end:
                own, keys = target[start:end], tiles[number, start:end].transpose(1, 2)
                torch.baddbmm(own, queries[start:end], keys, beta=0, alpha=scale, out=own)


def _write_columns(
    logits: Tensor, rotated: Sequence[Tensor], head: _HeadKeys, batch: _Batch, scale: float
) -> None:
    """Those of columns, as `_write_logits`."""
    visible = head.visible
    count = visible.columns_before(int(batch.blocks[-1]))
    starts = [visible.columns_before(each) for each in batch.bounds]
    flat = logits.flatten(0, 1)
    parts = itertools.pairwise((0, *starts, count))
    for queries, (start, end) in zip(rotated, parts, strict=True):
        if start < end:
            own, keys = flat[:, start:end], head.column_keys[start:end].T
            torch.addmm(own, queries.flatten(0, 1), keys, beta=0, alpha=scale, out=own)
    logits[:, :, count : head.first_tile] = -torch.inf
    hidden = visible.hidden_columns(batch.blocks, count)
    some = np.flatnonzero(hidden.any(0))
    if len(some):
        start, end = int(some[0]), int(some[-1]) + 1
        # Adding takes a quarter of the time of filling where a mask says.
        added = np.where(hidden[:, None, start:end], np.float32(-np.inf), np.float32(0))
        logits[:, :, start:end].add_(torch.from_numpy(added).to(logits.device))
