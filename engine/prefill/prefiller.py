"""Prefill on one rank: a prompt, chunk by chunk, into KV pages and a first distribution.

Here are the requests and their pages; `chunk` computes. Every rank of a mesh has a Prefiller, and
every call is made on all of them in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ...kernels.page_size import PAGE_TOKENS, pages_for
from ...kernels.pages import BlockTable, LayerPages
from ..errors import (
    CacheTooSmallError,
    ChunkOutOfMemoryError,
    InvalidRequestError,
    LeftMeshError,
)
from ..kv.chunk_pages import part_of
from ..kv.hand_off import HandOff, Place
from ..kv.pages import HeldPages, PagePool, Pages
from ..memory.out_of_memory import out_of_memory_raises
from ..messages import Tokens
from ..milestones import Milestone
from ..model.qwen2 import Qwen2
from ..parallel.mesh import Mesh
from .attention import Observer, Planted, PrefillParts
from .chunk import ChunkResult, run_chunk
from .sparsity import SparsityConfig

Push = Callable[[Place, HeldPages], None]

_PAGES_AT_ONCE = 512
"""Of one layer, that a sequence rank gives to others: 128 MB at most of the models served."""


@dataclass
class _Admitted:
    """A prompt under way; `done` tokens lie in its pages."""

    prompt: Tokens
    table: BlockTable
    done: int = 0


class Prefiller:
    """Computes prompts on one rank. Not thread-safe.

    Activations grow with the chunk, never with the prompt. An observer is shown sparse attention
    as it happens, and what was selected may be replaced by what is planted: for measurements.
    """

    def __init__(
        self,
        model: Qwen2,
        pool: PagePool,
        sparsity: SparsityConfig | None,
        observer: Observer | None = None,
        planted: Planted | None = None,
    ) -> None:
        self._pool = pool
        self._admitted: dict[str, _Admitted] = {}
        widened = _widened(pool, model.dtype) if pool.geometry.quantized else None
        self._parts = PrefillParts(model, pool, sparsity, observer, planted, widened)

    def admit(
        self,
        request_id: str,
        prompt: Tokens,
        pages: Sequence[int] | None = None,
        done: int = 0,
    ) -> None:
        """Reserve pages for a prompt, or take those that a decoder on the same pool reserved.

        Args:
            pages: held by someone else for the whole prompt, who then finds K and V in them.
            done: tokens whose K and V lie in `pages` already, whole pages of them; the first chunk
                starts there.

        Raises:
            CacheTooSmallError: the prompt is larger than all pages together.
            OutOfPagesError: they are not free now; nothing was reserved.
            InvalidRequestError: no tokens, too few pages, no place to go on at, or a request of
                that name is admitted already.
        """
        if len(prompt) == 0:
            raise InvalidRequestError("a prompt needs at least one token")
        if done % PAGE_TOKENS or not 0 <= done < len(prompt):
            raise InvalidRequestError(
                f"prefill goes on at a multiple of {PAGE_TOKENS} within the prompt's {len(prompt)} "
                f"tokens, not at {done}"
            )
        if request_id in self._admitted:
            raise InvalidRequestError(f"request {request_id} is being prefilled already")
        needed = pages_for(len(prompt))
        if needed > self._pool.num_pages:
            total = self._pool.num_pages * PAGE_TOKENS
            raise CacheTooSmallError("prefill", len(prompt), total)
        if pages is None:
            held = self._pool.allocate(needed)
        elif len(pages) < needed:
            raise InvalidRequestError(f"the prompt needs {needed} pages, not {len(pages)}")
        else:
            held = list(pages[:needed])
            self._pool.share(held)
        self._admitted[request_id] = _Admitted(prompt, BlockTable.of(held), done)

    def pages_to_fetch(
        self, request_id: str, start: int, end: int
    ) -> list[tuple[Place, HeldPages]]:
        """Where tokens [start, end) come back from, in place of a chunk, and into which pages.

        On a rank by itself: nothing is exchanged. They count as done: whoever asks has them there
        before the next chunk.

        Raises:
            InvalidRequestError: as `run_chunk`.
        """
        admitted = self._next_chunk_of(request_id, start, end)
        numbers = admitted.table.pages[start // PAGE_TOKENS : pages_for(end)]
        head = self._parts.model.heads.first_kv_head
        admitted.done = end
        return [
            (Place(layer, start // PAGE_TOKENS, head), self._pool.held(layer, numbers))
            for layer in range(self._pool.geometry.num_layers)
        ]

    def push(self, request_id: str, start: int, end: int, push: Push) -> None:
        """Hand off tokens [start, end), which lie in the pages, once more and to somebody else.

        Every sequence rank pushes its part.

        Args:
            push: of a hand-off.
        """
        heads, mesh = self._parts.model.heads, self._parts.model.mesh
        first = start // PAGE_TOKENS
        part = part_of(mesh, pages_for(end) - first)
        if not heads.owns_kv or part.start == part.stop:
            return
        table = self._admitted[request_id].table.pages[first : pages_for(end)]
        for layer in range(self._pool.geometry.num_layers):
            place = Place(layer, first + part.start, heads.first_kv_head)
            push(place, self._pool.held(layer, table[part]))

    def move_to(self, mesh: Mesh) -> None:
        """Compute on another mesh from now on, in which this rank's tensor rank is the same."""
        self._parts = replace(self._parts, model=self._parts.model.on_mesh(mesh))

    def share(self, request_id: str, done: int, takes: bool) -> None:
        """Copy the pages of a request's first tokens from the first sequence rank; collective.

        Where they are wanted it returns when they are there.

        Args:
            done: tokens, whole pages of them, that the next chunk begins behind.
            takes: whether they are wanted here.

        Raises:
            LeftMeshError: they may not have come, because the mesh was left.
            ChunkOutOfMemoryError: the device had too little; others may wait in a collective.
        """
        mesh = self._parts.model.mesh
        admitted = self._admitted[request_id]
        every = admitted.table.pages[: done // PAGE_TOKENS]
        with out_of_memory_raises(ChunkOutOfMemoryError(0, done)):
            for layer in range(self._pool.geometry.num_layers):
                for first in range(0, len(every), _PAGES_AT_ONCE):
                    self._share(layer, every[first : first + _PAGES_AT_ONCE], takes)
        if takes:
            # From here on they may be handed off, whatever becomes of the mesh.
            Milestone.after_what_is_launched(self._pool.device).wait()
            if mesh.is_left:
                raise LeftMeshError
        admitted.done = done

    def _share(self, layer: int, numbers: npt.NDArray[np.int64], takes: bool) -> None:
        mesh, held = self._parts.model.mesh, self._pool.held(layer, numbers)
        # A copy, also where pages are neighbours: what comes goes nowhere where it is not wanted.
        pages = held.read()
        bits = mesh.broadcast_over_sequence_ranks(pages.bits.clone())
        scales = pages.scales
        if scales is not None:
            scales = mesh.broadcast_over_sequence_ranks(scales.clone())
        if takes:
            held.write(Pages(bits.view(pages.values.dtype), scales))

    def rename(self, request_id: str, to: str, done: int) -> None:
        """Let a request go on under another name, at a place where it has been already.

        Raises:
            InvalidRequestError: no such request, one of the new name is here, or it was never
                there.
        """
        admitted = self._admitted.get(request_id)
        if admitted is None or to in self._admitted or not 0 <= done <= admitted.done:
            raise InvalidRequestError(f"request {request_id} cannot go on as {to} at {done} tokens")
        del self._admitted[request_id]
        admitted.done = done
        self._admitted[to] = admitted

    def release(self, request_id: str) -> None:
        """Give the pages of a request back, finished or not; unknown requests are no error."""
        admitted = self._admitted.pop(request_id, None)
        if admitted is not None:
            self._pool.release(admitted.table.pages.tolist())

    @torch.inference_mode()
    def run_chunk(
        self,
        request_id: str,
        start: int,
        end: int,
        hand_off: HandOff | None = None,
        layers_to_go: int = 1,
        score_top: int | None = None,
    ) -> ChunkResult:
        """Compute prompt tokens [start, end); collective over the mesh.

        On a GPU it returns when all is launched, so that the next chunk can be launched before this
        one is computed.

        Args:
            start: where the request's last chunk ended.
            end: a multiple of 128, or the end of the prompt.
            hand_off: takes each layer's finished pages, as far as they fall to this rank.
            layers_to_go: before how many whole layers the chunk counts as nearly computed; the last
                is none of them.
            score_top: score the prompt's own tokens, with so many alternatives; see `scores`.

        Raises:
            InvalidRequestError: no such request, or not its next chunk.
            ChunkOutOfMemoryError: the device had too little. The request is as it was before, and
                its pages are held until it is released; other ranks may wait in a collective.
        """
        admitted = self._next_chunk_of(request_id, start, end)
        with out_of_memory_raises(ChunkOutOfMemoryError(start, end)):
            prompt, table = admitted.prompt, admitted.table
            result = run_chunk(
                self._parts, prompt, table, start, end, hand_off, layers_to_go, score_top
            )
        admitted.done = end
        return result

    def _next_chunk_of(self, request_id: str, start: int, end: int) -> _Admitted:
        admitted = self._admitted.get(request_id)
        if admitted is None:
            raise InvalidRequestError(f"request {request_id} was not admitted, or was released")
        length = len(admitted.prompt)
        if start != admitted.done or not start < end <= length:
            raise InvalidRequestError(
                f"request {request_id}: chunk [{start}, {end}) does not follow on "
                f"{admitted.done} of {length} tokens"
            )
        if end % PAGE_TOKENS and end != length:
            raise InvalidRequestError(
                f"request {request_id}: a chunk must end at a multiple of {PAGE_TOKENS} or at "
                f"the prompt's end, not at {end}"
            )
        return admitted


def _widened(pool: PagePool, dtype: torch.dtype) -> LayerPages:
    """Room for one layer of all pages in a type that attention reads, in a sequence's order."""
    memory = torch.empty_like(pool.memory[0], dtype=dtype)
    return LayerPages(memory, BlockTable.of(range(pool.num_pages)))
