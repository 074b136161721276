"""How much of full attention sparse prefill keeps, by layer and head.

Recall of a query is exp(lse_sparse - lse_full): the share of its full attention that falls on
keys which it sees under sparse attention too (Qwen2.5-1M, arXiv 2501.15383, section 5).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table
from torch import Tensor

from ...engine.errors import OutOfMemoryError
from ...engine.kv.pages import PagePool
from ...engine.memory.out_of_memory import out_of_memory_raises
from ...engine.messages import Tokens
from ...engine.model.qwen2 import Qwen2
from ...engine.prefill.attention import SparseAttention
from ...engine.prefill.prefiller import Prefiller
from ...engine.prefill.sparsity import SparsityConfig
from ...kernels import dual_chunk
from ...kernels.page_size import pages_for

_REQUEST = "recall"
_LOWEST_SHARE = 0.01
_LAST_QUERIES = 64
_MOST_ROWS = 40


@dataclass(frozen=True)
class HeadRecall:
    """Recall of one head: the mean over all queries of all texts, and the first percentile.

    `last` is the mean over the last 64 queries of each text, where a question mostly stands,
    however the text was cut into chunks.
    """

    layer: int
    head: int
    mean: float
    lowest: float
    last: float


class RecallMeter:
    """An observer of sparse attention that computes full attention besides.

    The last layer computes the prompt's last token alone, with full attention: no keys are
    selected there, and it has no recall.
    """

    def __init__(self) -> None:
        self._chunks: dict[int, list[Tensor]] = {}
        self._texts: dict[int, list[Tensor]] = {}

    def __call__(self, seen: SparseAttention) -> None:
        _, full = dual_chunk.attention(
            seen.queries, seen.blocks, seen.pages, seen.stride, seen.scale
        )
        recall = (seen.lse - full).exp_().clamp_(max=1.0)
        self._chunks.setdefault(seen.layer, []).append(recall.cpu())

    def end_text(self) -> None:
        """Note that the chunks seen since the last text make a whole one."""
        for layer, chunks in self._chunks.items():
            self._texts.setdefault(layer, []).append(torch.cat(chunks))
        self._chunks.clear()

    def rows(self, layer: int) -> Tensor:
        """Recall of every query of the texts that have ended, float32 [rows, heads]."""
        return torch.cat(self._texts[layer])

    def last_rows(self, layer: int) -> Tensor:
        """Recall of the last 64 queries of each text that has ended, float32 [rows, heads]."""
        return torch.cat([text[-_LAST_QUERIES:] for text in self._texts[layer]])

    def heads(self) -> list[HeadRecall]:
        """Every head of every layer that selects, over the texts that have ended."""
        return [
            HeadRecall(
                layer,
                head,
                round(float(of_head.mean()), 4),
                round(float(np.quantile(of_head, _LOWEST_SHARE)), 4),
                round(float(self.last_rows(layer)[:, head].mean()), 4),
            )
            for layer in sorted(self._texts)
            for head, of_head in enumerate(self.rows(layer).T.numpy())
        ]


def measure(
    model: Qwen2, sparsity: SparsityConfig, prompts: Sequence[Tokens], chunk_tokens: int
) -> RecallMeter:
    """Prefill prompts sparsely, short ones too, and compute full attention besides."""
    meter = RecallMeter()
    pool = PagePool(model.page_geometry, pages_for(max(map(len, prompts))), model.device)
    prefiller = Prefiller(model, pool, replace(sparsity, threshold=0), meter)
    for prompt in prompts:
        ran_out = OutOfMemoryError(f"the device ran out of memory at {len(prompt):,} tokens")
        prefiller.admit(_REQUEST, prompt)
        try:
            with out_of_memory_raises(ran_out.with_remedy("take a shorter --length")):
                for start in range(0, len(prompt), chunk_tokens):
                    prefiller.run_chunk(_REQUEST, start, min(start + chunk_tokens, len(prompt)))
            meter.end_text()
        finally:
            prefiller.release(_REQUEST)
    return meter


@dataclass(frozen=True)
class RecallReport:
    """Recall of every head over `prompts` prompts of up to `tokens` tokens."""

    model: str
    settings: Mapping[str, str]
    prompts: int
    tokens: int
    heads: tuple[HeadRecall, ...]

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")

    def table(self) -> Table:
        """The heads that lose most, first."""
        table = Table(title=self.title)
        last = f"recall of the last {_LAST_QUERIES} queries"
        for name in ("layer", "head", "recall", "1 % of queries keep less than", last):
            table.add_column(name, justify="right")
        for each in sorted(self.heads, key=lambda head: head.mean)[:_MOST_ROWS]:
            figures = (f"{figure:.4f}" for figure in (each.mean, each.lowest, each.last))
            table.add_row(str(each.layer), str(each.head), *figures)
        return table

    @property
    def title(self) -> str:
        """What was measured."""
        return f"{self.model}: recall of sparse attention, {self.prompts} × {self.tokens:,} tokens"

    def grid(self, last: bool = False) -> npt.NDArray[np.float64]:
        """Mean recall [layers, heads], of all queries or only the last."""
        layers = 1 + max(each.layer for each in self.heads)
        heads = 1 + max(each.head for each in self.heads)
        grid = np.full((layers, heads), np.nan)
        for each in self.heads:
            grid[each.layer, each.head] = each.last if last else each.mean
        return grid
