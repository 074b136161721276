"""The whole engine in one process: for tests, evaluation and anyone with a script."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.page_size import pages_for
from .kv.formats import KVCacheDtype
from .kv.hand_off import HandOff, Place, RequestPages
from .kv.pages import HeldPages, PagePool
from .messages import Tokens
from .model.config import WeightFormat
from .model.qwen2 import Qwen2
from .parallel.mesh import Mesh
from .prefill.prefiller import Prefiller
from .prefill.sparsity import SparsityConfig


class LocalPrefill:
    """A checkpoint on a mesh of one, with pages for prompts of up to `max_tokens`.

    prefill = LocalPrefill(folder, max_tokens=65536)
    logits = prefill.logits(prompt)
    """

    def __init__(
        self,
        folder: Path,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        sparse: bool = True,
        mesh: Mesh | None = None,
        kv_cache_dtype: KVCacheDtype = "auto",
        weights: WeightFormat = "auto",
    ) -> None:
        device = device or torch.device("cpu")
        self.model = Qwen2.load(folder, mesh or Mesh.single(), dtype, device, weights)
        geometry = self.model.pages_kept_as(kv_cache_dtype)
        self.pool = PagePool(geometry, pages_for(max_tokens), device)
        sparsity = SparsityConfig.from_folder(folder) if sparse else None
        self.prefiller = Prefiller(self.model, self.pool, sparsity)

    def logits(self, prompt: Tokens, chunk_tokens: int = 32768) -> Tensor:
        """float32 [vocab] after the prompt's last token."""
        self.prefiller.admit("local", prompt)
        try:
            result = None
            for start in range(0, len(prompt), chunk_tokens):
                end = min(start + chunk_tokens, len(prompt))
                result = self.prefiller.run_chunk("local", start, end)
            assert result is not None
            assert result.logits is not None
            return result.logits
        finally:
            self.prefiller.release("local")


class DirectHandOff(HandOff):
    """Hands pages to a decoder in the same process, or to whatever else keeps them."""

    def __init__(self, pages: RequestPages, request_id: str) -> None:
        self._pages = pages
        self._request_id = request_id

    def push(self, place: Place, pages: HeldPages) -> None:
        self._pages.receive(self._request_id, place, pages.read())

    def fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> None:
        """Copies from pool to pool."""
        for place, pages in wanted:
            heads = pages.layer.values.shape[1]
            pages.write(self._pages.held(self._request_id, place, len(pages), heads).read())

    def flush(self) -> None:
        """Nothing is ever under way."""

    def abandon(self) -> None:
        """Nothing is ever under way."""
