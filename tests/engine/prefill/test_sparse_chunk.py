"""Which of a rank's blocks belong to a window of a chunk: arithmetic, held to its definition."""

from types import SimpleNamespace
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from longreach.engine.prefill.chunk_rows import ChunkRows
from longreach.engine.prefill.full_rows import first_full_block
from longreach.engine.prefill.selection import Window
from longreach.engine.prefill.sparse_chunk import SparsePart
from longreach.kernels.dual_chunk import BLOCK_ROWS, QueryBlocks


@given(st.data())
def test_a_part_has_a_windows_blocks_and_their_rows(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 12 * BLOCK_ROWS), "length")
    start = BLOCK_ROWS * data.draw(st.integers(0, (length - 1) // BLOCK_ROWS), "first block")
    ranks = data.draw(st.integers(1, 4), "ranks")
    rank = data.draw(st.integers(0, ranks - 1), "rank")
    window_start = data.draw(st.integers(start // BLOCK_ROWS, (length - 1) // BLOCK_ROWS))
    window_end = data.draw(st.integers(window_start + 1, -(-length // BLOCK_ROWS)))
    window = Window(window_start * BLOCK_ROWS, min(window_end * BLOCK_ROWS, length), range(0))
    held = [b for b in range(start // BLOCK_ROWS, -(-length // BLOCK_ROWS)) if b % ranks == rank]
    rows = SimpleNamespace(blocks=QueryBlocks(tuple(held), length), length=length)

    part = SparsePart.of(window, cast(ChunkRows, rows))

    every = [block for block in held if window_start <= block < window_end]
    assert list(part.every.blocks) == every
    assert list(part.sparse.blocks) == [b for b in every if b < first_full_block(length)]
    positions = rows.blocks.positions().tolist()
    of_window = [p for p in positions if window.start <= p < window.end]
    assert positions[part.all_rows] == of_window
    sparse = {b * BLOCK_ROWS + row for b in part.sparse.blocks for row in range(BLOCK_ROWS)}
    assert positions[part.rows] == [p for p in of_window if p in sparse]
