"""What is measured, each with its check, its floor, and its baseline."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...kernels import dual_chunk, elementwise, quantized, sparse
from ...kernels.dual_chunk import triton_decode
from ...kernels.dual_chunk.decode_plan import DecodePlan
from ...kernels.dual_chunk.segments import BLOCK_ROWS, Rotation, SegmentQueries, rotation
from ...kernels.page_size import PAGE_TOKENS
from ...kernels.sparse import HeadBudget, Selections, Sums
from .measure import Ceilings, Run, Timing, captured
from .setup import CHUNK_TOKENS, QWEN_7B, QWEN_14B, STRIDE, Layer, sdpa_baseline

LAST_QUERIES = 64
MILLION = 2**20
_MOST_ERROR = 5e-3
_COVERAGE, _HEAVY = 0.96, LAST_QUERIES / 2048


@dataclass(frozen=True)
class Result:
    """`work` is FLOP or bytes; `unit` says which."""

    operation: str
    shape: str
    timing: Timing
    work: float
    unit: str
    error: float
    baseline: str = ""
    baseline_ms: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether it computed the right thing; NaN never passes."""
        return self.error < _MOST_ERROR

    @property
    def rate(self) -> float:
        """TFLOP/s or GB/s."""
        return self.work / self.timing.p50 / (1e9 if self.unit == "TFLOP/s" else 1e6)

    def fraction(self, ceilings: Ceilings) -> float:
        """Of the ceiling that binds."""
        units = {"TFLOP/s": ceilings.tflops, "GB/s": ceilings.read, "GB/s r+w": ceilings.copy}
        return self.rate / units[self.unit]


Bench = Callable[[torch.device, Path | None], Iterator[Result]]


def dense(device: torch.device, budgets: Path | None) -> Iterator[Result]:
    """The last 32K rows of a prompt against all its keys."""
    for shape, length in (
        (QWEN_7B, 2**17),
        (QWEN_7B, 2**19),
        (QWEN_7B, MILLION),
        (QWEN_14B, 2**17),
    ):
        layer = Layer.random(shape, length, device)
        repeats = 9 if length == 2**17 else 3
        arguments = (layer.queries, layer.blocks, layer.pages, STRIDE, layer.scale)
        output, lse = dual_chunk.attention(*arguments)
        error = layer.error(output, lse)
        yield Result(
            "dense dual chunk prefill", where(layer),
            Timing.of(lambda arguments=arguments: dual_chunk.attention(*arguments), repeats, 1),
            layer.flops, "TFLOP/s", error, "cuDNN", Timing.of(sdpa_baseline(layer), repeats, 1).p50,
        )  # fmt: skip


def sparse_prefill(device: torch.device, budgets: Path | None) -> Iterator[Result]:
    """Selection and sparse attention of one chunk under published budgets, mean over layers."""
    if budgets is None:
        print("sparse prefill is left out: name published budgets with --budgets")
        return
    per_layer = read_budgets(budgets)
    for length in (MILLION, 2**17):
        layer = Layer.random(QWEN_7B, length, device)
        baseline = Timing.of(sdpa_baseline(layer), 3, 1).p50
        selecting = Timing.mean([selection_time(layer, each) for each in per_layer[::4]])
        yield Result(
            "selection, bands, published budgets", where(layer), selecting,
            2 * 2 * LAST_QUERIES * layer.shape.heads * layer.length * layer.shape.head_dim,
            "TFLOP/s", 0.0,
        )  # fmt: skip
        for kind, step in (("clustered", 1), ("isolated bands", 4), ("scattered", 14)):
            yield attention_of(layer, kind, per_layer[::step], selecting, baseline)


def attention_of(
    layer: Layer, kind: str, layers: list[list[HeadBudget]], selecting: Timing, baseline: float
) -> Result:
    """Sparse attention over made-up selections of one kind, with selection's time added."""
    generator = np.random.default_rng(0)
    timings, densities, errors = [], [], []
    for number, budgets in enumerate(layers):
        selections = made_up(layer, budgets, kind, generator)
        arguments = (
            layer.queries, layer.blocks, layer.pages, STRIDE, layer.scale, selections,
        )  # fmt: skip
        if number == 0:
            errors.append(layer.error(*sparse.attention(*arguments), selections))
        run = captured(lambda a=arguments: sparse.attention(*a))
        timings.append(Timing.of(run, 3, 1))
        densities.append(density(layer, selections))
    attending, covered = Timing.mean(timings), float(np.mean(densities))
    share = selecting.p50 / (selecting.p50 + attending.p50)
    return Result(
        f"selection + sparse, {kind}", where(layer), attending.plus(selecting),
        layer.flops * covered, "TFLOP/s", max(errors), "cuDNN dense", baseline,
        f"density {covered:.4f}, attention {attending.p50:.2f} ms, selection {share:.0%}",
    )  # fmt: skip


def adaptive(device: torch.device, budgets: Path | None) -> Iterator[Result]:
    """Selection by coverage, where there is structure to find, with its recall."""
    for length in (2**17, MILLION):
        layer = planted(length, device)
        baseline = Timing.of(sdpa_baseline(layer), 3, 1).p50

        def choose(layer: Layer = layer) -> Selections:
            return sparse.by_coverage(last_sums(layer, _HEAVY), _HEAVY, _COVERAGE)

        selections = choose()
        dense_arguments = (layer.queries, layer.blocks, layer.pages, STRIDE, layer.scale)
        arguments = (*dense_arguments, selections)
        _, full = dual_chunk.attention(*dense_arguments)
        output, lse = sparse.attention(*arguments)
        recall = (lse - full).exp()
        selecting = Timing.of(captured(choose), 9)
        attending = Timing.of(captured(lambda a=arguments: sparse.attention(*a)), 9)
        covered = density(layer, selections)
        share = selecting.p50 / (selecting.p50 + attending.p50)
        yield Result(
            "selection + sparse, by coverage", where(layer), attending.plus(selecting),
            layer.flops * covered, "TFLOP/s", layer.error(output, lse, selections),
            "cuDNN dense", baseline,
            f"density {covered:.4f}, recall mean {float(recall.mean()):.4f} worst head "
            f"{float(recall.mean(0).min()):.4f}, attention {attending.p50:.2f} ms, "
            f"selection {share:.0%}",
        )  # fmt: skip


def decode(device: torch.device, budgets: Path | None) -> Iterator[Result]:
    """One step of one layer, as a CUDA graph."""
    layer = Layer.random(QWEN_7B, MILLION, device)
    yield from decode_steps("paged decode", layer, layer.memory, None)


def decode_steps(
    name_of_all: str, layer: Layer, memory: Tensor, page_scales: Tensor | None
) -> Iterator[Result]:
    """Over these pages, which hold the numbers of the layer's."""
    shape, device = layer.shape, memory.device
    cases = {
        "1 x 1M": [MILLION],
        "8 x 128K": [2**17] * 8,
        "1M + 31 x 1K": [2**20 - 2**15] + [2**10] * 31,
    }
    for name, lengths in cases.items():
        tables, first = torch.zeros(len(lengths), MILLION // PAGE_TOKENS, dtype=torch.int32), 0
        for row, length in enumerate(lengths):
            pages = layer.table.pages[first : first + length // PAGE_TOKENS]
            tables[row, : len(pages)] = torch.from_numpy(pages.astype(np.int32))
            first += len(pages)
        tables = tables.to(device)
        queries = layer.queries.rows(slice(CHUNK_TOKENS - len(lengths), CHUNK_TOKENS))
        scales = torch.full((len(lengths),), layer.scale, device=device)
        plan = DecodePlan.allocate(
            len(lengths), triton_decode.programs_per_kv_head(shape.kv_heads, device), device
        )
        plan.refresh(lengths)
        arguments = (queries, memory, tables, plan, STRIDE, scales, None, page_scales)
        output, _ = triton_decode.decode_attention(*arguments)
        error = decode_error(layer, queries, tables, lengths, output)
        size = sum(lengths) * shape.kv_heads * 2 * shape.head_dim * memory.itemsize
        run = captured(lambda a=arguments: triton_decode.decode_attention(*a))
        yield Result(
            name_of_all, f"{shape.name}, {name}", Timing.of(run, 30, 3), size, "GB/s", error
        )


def pages_of_8_bits(device: torch.device, budgets: Path | None) -> Iterator[Result]:
    """Decode over a million tokens of them; a chunk narrowed; a million tokens widened."""
    layer = Layer.random(QWEN_7B, MILLION, device)
    shape = layer.shape
    largest = layer.memory.abs().amax((-2, -1)).float()
    scales = quantized.reference.scale_for(largest)
    wide_scales = scales.to(layer.memory.dtype)[..., None, None]
    memory = (layer.memory / wide_scales).to(torch.float8_e4m3fn)
    layer = replace(layer, memory=memory.to(layer.memory.dtype) * wide_scales)
    yield from decode_steps("paged decode, e4m3", layer, memory, scales)

    table, wide = layer.table.on(device), torch.empty_like(layer.memory)
    quantized.widen_pages(memory, scales, table, wide)
    expected = layer.memory[table.long()]
    error = float((wide.float() - expected.float()).norm() / expected.float().norm())
    del expected
    run = captured(lambda: quantized.widen_pages(memory, scales, table, wide))
    yield Result(
        "widen e4m3 pages", f"{shape.name}, 1M", Timing.of(run, 20), 3 * memory.numel(),
        "GB/s r+w", error,
    )  # fmt: skip

    rows = CHUNK_TOKENS
    k, v = torch.randn(2, rows, shape.kv_heads, shape.head_dim, device=device).bfloat16().unbind()
    turn = rotation(torch.arange(rows, device=device), shape.head_dim, 1e7)
    pages = torch.randperm(rows // PAGE_TOKENS, device=device)
    held = []
    for version in (quantized, quantized.reference):
        version.narrow_pages(memory, scales, pages, k, v, turn)
        out = torch.empty_like(layer.memory[: len(pages)])
        quantized.widen_pages(memory, scales, pages.int(), out)
        held.append(out.float())
    run = captured(lambda: quantized.narrow_pages(memory, scales, pages, k, v, turn))
    yield Result(
        "rotate and narrow to e4m3 pages", f"{rows} rows of the 7B", Timing.of(run, 20),
        6 * k.numel(), "GB/s r+w", float((held[0] - held[1]).norm() / held[1].norm()),
        "PyTorch", Timing.of(
            lambda: quantized.reference.narrow_pages(memory, scales, pages, k, v, turn), 5
        ).p50,
    )  # fmt: skip


def decode_error(
    layer: Layer, queries: SegmentQueries, tables: Tensor, lengths: list[int], output: Tensor
) -> float:
    """Against dense prefill's kernel, of the first and the last sequence."""
    errors = []
    for row in (0, len(lengths) - 1):
        length = lengths[row]
        one = Layer(
            layer.shape, length, queries.rows(slice(row, row + 1)), layer.memory,
            layer.table.of(tables[row, : length // PAGE_TOKENS].tolist()),
        )  # fmt: skip
        expected = one_row(one)
        errors.append(float((output[row].double() - expected).norm() / expected.norm()))
    return max(errors) if not output.isnan().any() else float("nan")


def one_row(layer: Layer) -> Tensor:
    """Exact attention of every head of the one query row at the end of a prompt, [heads, d]."""
    rows = layer.queries
    rotations = (rows.intra, rows.successive, rows.inter)
    whole = Layer(
        layer.shape, layer.length,
        SegmentQueries(*(each.expand(CHUNK_TOKENS, -1, -1) for each in rotations)),
        layer.memory, layer.table,
    )  # fmt: skip
    return torch.stack(
        [whole.exact(CHUNK_TOKENS - 1, head, None)[0] for head in range(layer.shape.heads)]
    )


def between_products(device: torch.device, budgets: Path | None) -> Iterator[Result]:
    """Norms, activation, rotation and page writes of one prefill chunk of the 7B."""
    rows, hidden, middle, shape = CHUNK_TOKENS, 3584, 18_944, QWEN_7B

    def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    x, residual, weight = random(rows, hidden), random(rows, hidden), random(hidden)
    gate_up = random(rows, 2 * middle)
    q = random(rows, shape.heads, shape.head_dim)
    k = random(rows, shape.kv_heads, shape.head_dim)
    angles = [
        Rotation(*(random(rows, shape.head_dim // 2, dtype=torch.float32) for _ in range(2)))
        for _ in range(3)
    ]
    memory = random(rows // PAGE_TOKENS, shape.kv_heads, 2, PAGE_TOKENS, shape.head_dim)
    slots = torch.randperm(rows // PAGE_TOKENS, device=device)[:, None] * PAGE_TOKENS
    slots = (slots + torch.arange(PAGE_TOKENS, device=device)).flatten()
    reference = elementwise.reference
    runs: dict[str, tuple[Run, Run, int]] = {
        "add + RMS norm": (
            lambda: elementwise.add_rms_norm(x, residual, weight, 1e-6),
            lambda: reference.add_rms_norm(x, residual, weight, 1e-6), 8 * x.numel(),
        ),
        "SwiGLU": (
            lambda: elementwise.swiglu(gate_up), lambda: reference.swiglu(gate_up),
            3 * gate_up.numel(),
        ),
        "rotate queries thrice": (
            lambda: elementwise.rotate_queries(q, *angles),
            lambda: reference.rotate_queries(q, *angles), 8 * q.numel(),
        ),
        "rotate and write pages": (
            lambda: elementwise.write_pages(memory, slots, k, k, angles[0]),
            lambda: reference.write_pages(memory, slots, k, k, angles[0]), 8 * k.numel(),
        ),
    }  # fmt: skip
    for name, (run, definition, size) in runs.items():
        error = difference(run, definition, memory)
        yield Result(
            name, f"{rows} rows of the 7B", Timing.of(run, 20), size, "GB/s r+w", error,
            "PyTorch", Timing.of(definition, 5).p50,
        )  # fmt: skip


def difference(run: Run, definition: Run, memory: Tensor) -> float:
    """The largest relative difference of what both return, or else leave in memory."""

    def outcome(of: Run) -> list[Tensor]:
        memory.fill_(torch.nan)
        result = of()
        if result is None:
            return [memory.clone()]
        if isinstance(result, SegmentQueries):
            return [result.intra, result.successive, result.inter]
        return [result] if isinstance(result, Tensor) else list(result)  # pyright: ignore

    pairs = zip(outcome(run), outcome(definition), strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def where(layer: Layer) -> str:
    """How a prefill case is called in the table."""
    return f"{layer.shape.name}, 32K at the end of {layer.length // 1024}K"


def read_budgets(path: Path) -> list[list[HeadBudget]]:
    """Of every layer and head, from a checkpoint's sparse_attention_config.json."""
    layers = json.loads(path.read_text("utf-8"))
    return [[HeadBudget(*layer[str(h)][1:3]) for h in range(len(layer))] for layer in layers]


def last_sums(layer: Layer, heavy: float = float("inf")) -> Sums:
    """Of the chunk's last rows."""
    rows = slice(CHUNK_TOKENS - LAST_QUERIES, CHUNK_TOKENS)
    return sparse.sums(
        layer.queries.rows(rows), layer.length - LAST_QUERIES, layer.pages, 0, STRIDE,
        layer.scale, layer.shape.group, heavy,
    )  # fmt: skip


def selection_time(layer: Layer, budgets: list[HeadBudget]) -> Timing:
    """Of everything between queries and lists."""
    return Timing.of(captured(lambda: sparse.by_bands(last_sums(layer), budgets)), 5, 1)


def made_up(
    layer: Layer, budgets: list[HeadBudget], kind: str, generator: np.random.Generator
) -> Selections:
    """Columns anywhere, and slashes of one kind, exactly as many as budgets allow.

    "clustered": bands of 128 slashes, half of them next to each other at the diagonal, the others
    anywhere; "isolated bands": all of them anywhere; "scattered": single slashes anywhere.
    """
    tiles = layer.length // BLOCK_ROWS
    before = layer.length - CHUNK_TOKENS
    columns, distances = [], []
    for budget in budgets:
        count = min(budget.verticals, before)
        columns.append(np.sort(generator.choice(before, count, replace=False)).tolist())
        bands = min(budget.bands, tiles - 2)
        near = bands // 2 if kind == "clustered" else 1
        if kind == "scattered":
            slashes = generator.choice(
                layer.length, min(budget.slashes, layer.length), replace=False
            )
            touched = np.concatenate(([0], slashes // BLOCK_ROWS, -(-slashes // BLOCK_ROWS)))
        else:
            far = generator.choice(tiles - 2, bands - near, replace=False)
            chosen = np.concatenate((np.arange(near), far, [0]))
            touched = np.concatenate((chosen, chosen + 1))
        distances.append(np.unique(touched[touched < tiles]).tolist())
    made = Selections.of(columns, distances)
    device = layer.memory.device
    return Selections(made.columns.to(device), made.distances.to(device))


def density(layer: Layer, selections: Selections) -> float:
    """Share of causal pairs computed, in tiles of 128 keys; packed columns count as they are."""
    blocks = np.array(layer.blocks.blocks)
    pairs = 0
    for head in range(layer.shape.heads):
        columns, distances = selections.of_head(head)
        tiles = np.searchsorted(distances, blocks, side="right").sum()
        early = np.searchsorted(columns, blocks * BLOCK_ROWS).sum()
        pairs += BLOCK_ROWS * (tiles * BLOCK_ROWS + early)
    return 4 * layer.shape.head_dim * pairs / layer.flops


def planted(length: int, device: torch.device) -> Layer:
    """Queries that look at 96 columns which all share, and at three distances of each head.

    Each column pulls with a logit of 18, and each of the three distances with one of 20; noise
    around them is that of normally distributed keys.
    """
    layer = Layer.random(QWEN_7B, length, device)
    generator = np.random.default_rng(length)
    shape, scale = layer.shape, layer.scale
    common = torch.nn.functional.normalize(torch.randn(shape.head_dim, device=device), dim=0)
    columns = generator.choice(length - CHUNK_TOKENS, 96, replace=False)
    flat = layer.memory.view(-1, shape.head_dim)
    pages = layer.table.pages[columns // PAGE_TOKENS]
    for kv_head in range(shape.kv_heads):
        rows = (pages * shape.kv_heads + kv_head) * 2 * PAGE_TOKENS + columns % PAGE_TOKENS
        flat[torch.from_numpy(rows).to(device)] = (common * 18).to(flat.dtype)
    keys, _ = layer.keys_values()
    first = length - CHUNK_TOKENS
    queries = torch.randn(CHUNK_TOKENS, shape.heads, shape.head_dim, device=device) * 0.2
    queries += common / scale
    for head in range(shape.heads):
        own = keys[head // shape.group]
        for distance in (0, *generator.choice(first // 2, 2, replace=False) + 128):
            looked_at = own[first - distance : length - distance].float()
            queries[:, head] += looked_at * (20 / scale) / looked_at.square().sum(1, keepdim=True)
    rotated = queries.to(torch.bfloat16)
    return Layer(
        shape, length, SegmentQueries(rotated, rotated, rotated), layer.memory, layer.table
    )


CASES: dict[str, Bench] = {
    "dense": dense,
    "sparse": sparse_prefill,
    "adaptive": adaptive,
    "decode": decode,
    "quantized": pages_of_8_bits,
    "elementwise": between_products,
}

__all__ = ["CASES", "Result"]
