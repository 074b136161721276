"""Decode steps over several GPUs: a rank each, with its heads and their pages.

What one GPU can hold is measured on one as well, in the same run, and says the same. The floor is
what a rank must read of weights, K and V at the measured bandwidth.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.multiprocessing.spawn import spawn

from ...engine.errors import GB, ConfigurationError
from ...engine.model.config import ModelConfig
from ...kernels.page_size import PAGE_TOKENS
from ..csv_lines import append
from .ceilings import median_seconds
from .environment import Environment
from .options import Options
from .running import settled
from .span_rank import SpanCase, SpanRun, read_runs, run_rank
from .subject import page_geometry
from .work import Work


@dataclass(frozen=True)
class Line:
    """One batch on so many ranks. `logprobs_difference` is of its first token's, against one rank;
    None where that was not measured, or where another token came."""

    model: str
    ranks: int
    batch: str
    weights: str
    kv_cache: str
    tpot_p20_ms: float
    tpot_ms: float
    tpot_p80_ms: float
    tpot_floor_ms: float
    tpot_over_floor: float
    read_gbs: float
    logprobs_difference: float | None
    same_tokens: int | None
    free_gb: float
    environment: Environment

    def text(self) -> str:
        """A row of the table."""
        difference = self.logprobs_difference
        found = "-" if difference is None else f"{difference:.1e}, {self.same_tokens} equal"
        return (
            f"{self.ranks:5} {self.batch:22}{self.tpot_p20_ms:9.3f}{self.tpot_ms:9.3f}"
            f"{self.tpot_p80_ms:9.3f}{self.tpot_floor_ms:9.3f}{self.tpot_over_floor:8.3f}"
            f"{self.free_gb:9.1f}  {found}"
        )


_HEADER = (
    "ranks batch                       p20     TPOT      p80    floor  / floor  free GB  logprobs"
)


def measure(options: Options) -> None:
    """Print and keep a line for every batch and number of ranks.

    Raises:
        ConfigurationError: a mesh has several sequence ranks, more ranks than there are GPUs, or as
            many as do not divide the model.
    """
    on_gpu = torch.cuda.is_available()
    config = ModelConfig.from_folder(options.files.folder)
    for tensor, sequence in options.meshes:
        if sequence > 1:
            raise ConfigurationError(
                f"decode has tensor ranks alone; leave {tensor}x{sequence} out of --meshes"
            )
        if on_gpu and tensor > torch.cuda.device_count():
            raise ConfigurationError(f"{tensor} ranks need as many GPUs; see --meshes")
        config.check_tensor_parallel(tensor)
    read = _read_rate(torch.device("cuda" if on_gpu else "cpu"))
    print(f"{options.name}, weights {options.weights}, pages {options.kv_cache}; ms\n{_HEADER}")
    alone: list[SpanRun] | None = None
    for tensor, _ in options.meshes:
        runs = _run(options, tensor)
        for number, run in enumerate(runs):
            line = _line(options, tensor, number, run, alone, read)
            print(line.text(), flush=True)
            append(options.csv, [line])
        alone = runs if tensor == 1 else alone


def _run(options: Options, ranks: int) -> list[SpanRun]:
    case = SpanCase(
        ranks, options.files, options.kv_cache, options.kept, options.batches, options.decode,
        options.seed,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        spawn(run_rank, (case, Path(folder)), nprocs=ranks)
        return read_runs(Path(folder))


def _read_rate(device: torch.device) -> float:
    """Bytes a second, of a plain sum."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**22, device=device)
    return source.nbytes / median_seconds(source.sum, device)


def _line(
    options: Options,
    ranks: int,
    number: int,
    run: SpanRun,
    alone: list[SpanRun] | None,
    read: float,
) -> Line:
    config, lengths = ModelConfig.from_folder(options.files.folder), options.batches[number]
    page_bytes = page_geometry(config, options.kv_cache).bytes_per_page
    work = Work(config, torch.bfloat16.itemsize, options.kept)
    floor = work.decode_bytes(lengths, page_bytes / PAGE_TOKENS) / ranks / read
    steps = settled(run.steps)
    low, *_, high = statistics.quantiles(steps, n=5)
    tpot = statistics.median(steps)
    difference, same = (None, None) if alone is None else _compared(run, alone[number])
    return Line(
        model=options.name,
        ranks=ranks,
        batch="+".join(f"{lengths.count(n)}x{n}" for n in dict.fromkeys(lengths)),
        weights=options.weights,
        kv_cache=options.kv_cache,
        tpot_p20_ms=low * 1e3,
        tpot_ms=tpot * 1e3,
        tpot_p80_ms=high * 1e3,
        tpot_floor_ms=floor * 1e3,
        tpot_over_floor=tpot / floor,
        read_gbs=read / 1e9,
        logprobs_difference=difference,
        same_tokens=same,
        free_gb=run.free_bytes / GB,
        environment=Environment.of_this_run(options.commit),
    )


def _compared(run: SpanRun, alone: SpanRun) -> tuple[float | None, int]:
    """How far the first tokens' log-probabilities are apart, and how many tokens are the same."""
    pairs = [
        pair for own in zip(run.first, alone.first, strict=True) for pair in zip(*own, strict=True)
    ]
    same = [(ours, theirs) for (token, ours), (other, theirs) in pairs if token == other]
    return max((abs(a - b) for a, b in same), default=None), len(same)
