"""Predicts prefill on several GPUs from the work of one rank of each mesh, timed on this one.

Measured: a rank's chunks at some places of the prompt, with its rows, heads and share of the MLP.
Modelled: its other chunks, by interpolation, and communication, by the bytes that must travel.
Assumed: the link's bandwidth and a collective's latency. Communication is not hidden behind
computing, and ranks wait for nobody: rows are dealt out in turn, so all have the same work.
"""

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...engine.kv.pages import PagePool
from ...engine.memory.fit import free_bytes
from ...engine.model.config import ModelConfig
from ...engine.model.heads import RankHeads
from ...engine.model.load import load_model
from ...engine.prefill.prefiller import Prefiller
from ...engine.prefill.sparsity import SparsityConfig
from ...kernels.page_size import pages_for
from ...kernels.sparse import Selections
from ..csv_lines import append
from .environment import Environment
from .fit import fit
from .lone_rank import LoneRank, Recorded
from .options import Options
from .subject import page_geometry, random_prompt, synchronize
from .work import Work

_SAMPLES = 6
_REPEATS = 3


@dataclass(frozen=True)
class Traffic:
    """What one rank sends or receives for a whole prompt."""

    gathered_bytes: float
    reduced_bytes: float
    collectives: int

    @classmethod
    def of(
        cls, config: ModelConfig, mesh: LoneRank, tokens: int, chunk_tokens: int, itemsize: int
    ) -> "Traffic":
        """K and V of other ranks' rows in all layers; two ring all-reduces of hidden states, which
        carry each row 2 (n - 1) / n times, in all layers but the last."""
        tensor, sequence = mesh.tensor_parallel, mesh.sequence_parallel
        heads = RankHeads.of(config, tensor, mesh.tensor_rank)
        row = 2 * heads.num_kv_heads * config.head_dim * itemsize
        gathered = tokens * row * config.num_layers * (sequence - 1) / sequence
        states = tokens / sequence * config.hidden_size * itemsize
        reduced = 2 * states * 2 * (tensor - 1) / tensor * (config.num_layers - 1)
        # Gathering pages, the last queries, and two for selections; and two all-reduces.
        in_layer = 4 * (sequence > 1) + 2 * (tensor > 1)
        return cls(gathered, reduced, -(-tokens // chunk_tokens) * config.num_layers * in_layer)


@dataclass(frozen=True)
class Line:
    """One mesh; every figure says how it came about. Seconds, unless the name says otherwise."""

    model: str
    tokens: int
    attention: str
    tensor_parallel: int
    sequence_parallel: int
    gpus: int
    first_chunk_measured: float
    last_chunk_measured: float
    compute_modelled: float
    gather_modelled: float
    reduce_modelled: float
    latency_modelled: float
    ttft_modelled: float
    speedup_modelled: float
    efficiency_modelled: float
    link_gbs_assumed: float
    latency_us_assumed: float
    environment: Environment

    def text(self) -> str:
        """A row of the table."""
        communication = self.gather_modelled + self.reduce_modelled + self.latency_modelled
        return (
            f"TP{self.tensor_parallel} x SP{self.sequence_parallel:<3}{self.gpus:4} "
            f"{self.first_chunk_measured:12.3f}{self.last_chunk_measured:12.3f}"
            f"{self.compute_modelled:12.2f}{communication:14.2f}{self.ttft_modelled:10.2f}"
            f"{self.speedup_modelled:9.2f}{self.efficiency_modelled:11.2f}"
        )


_HEADER = (
    "mesh     GPUs  first chunk  last chunk     compute communication      TTFT  speedup efficiency"
    "\n                (measured)  (measured)  (modelled)     (modelled) (modelled)"
)


def predict(options: Options, device: torch.device) -> None:
    """Print and keep a line for every mesh, the first of which the others are compared with.

    Raises:
        ConfigurationError: the prompt does not fit on one rank, or a mesh does not divide.
    """
    config = ModelConfig.from_folder(options.files.folder)
    tokens = options.tokens[-1]
    work = Work(config, torch.bfloat16.itemsize)
    geometry = page_geometry(config, "bf16")
    wanted = SparsityConfig.from_folder(options.files.folder)
    sparsity = wanted if "sparse" in options.attentions else None
    fit(work, geometry, options.chunk_tokens, free_bytes(device), sparsity).check(tokens)
    for tensor, _ in options.meshes:
        config.check_tensor_parallel(tensor)
    print(
        f"{options.name}, weights {options.weights}, {tokens:,} tokens in chunks of "
        f"{options.chunk_tokens:,}; assumed: links of {options.link_gbs:.0f} GB/s each way, "
        f"{options.latency_us:.0f} us a collective\n{_HEADER}"
    )
    recorder = _Recorder(config.num_layers - 1)
    alone = None
    for tensor, sequence in [(1, 1), *(mesh for mesh in options.meshes if mesh != (1, 1))]:
        owner = (pages_for(tokens) - 1) % sequence
        mesh = LoneRank(tensor, sequence, owner * tensor)
        starts, seconds = _time_rank(options, mesh, sparsity, device, recorder)
        _give_back(device)
        line = _line(options, config, mesh, starts, seconds, alone)
        alone = line.ttft_modelled if alone is None else alone
        print(line.text(), flush=True)
        append(options.csv, [line])


class _Recorder:
    """Keeps what every layer of a chunk selected when one rank had all heads."""

    def __init__(self, num_layers: int) -> None:
        self.by_start: dict[int, list[list[Selections]]] = {}
        self.start: int | None = None
        self._num_layers = num_layers

    def __call__(self, selections: list[Selections]) -> list[Selections]:
        if self.start is not None:
            kept = self.by_start.setdefault(self.start, [])
            if len(kept) < self._num_layers:
                kept.append(selections)
        return selections


def _time_rank(
    options: Options,
    mesh: LoneRank,
    sparsity: SparsityConfig | None,
    device: torch.device,
    recorder: _Recorder,
) -> tuple[list[int], list[float]]:
    """Where the sampled chunks start, and the seconds that a rank takes for each."""
    tokens = options.tokens[-1]
    model = load_model(options.files, mesh, torch.bfloat16, device, options.seed)
    pool = PagePool(model.page_geometry, pages_for(tokens), device)
    for layer in pool.memory:
        # What earlier chunks would have left: selection must not meet ties.
        layer.normal_()
    prompt = random_prompt(options.files, tokens, options.seed)
    pages = pool.allocate(pages_for(tokens))
    single = mesh.tensor_parallel == mesh.sequence_parallel == 1
    recorded = Recorded(model.heads)
    planted = recorder if single else recorded.plant
    prefiller = Prefiller(model, pool, sparsity, planted=planted)
    starts, seconds = _sampled_starts(tokens, options.chunk_tokens), []
    for start in starts:
        end = min(start + options.chunk_tokens, tokens)
        recorder.start = start if single else None
        recorded.record([] if single else recorder.by_start.get(start, []))
        # The first run of each compiles what may not have been met before.
        times = []
        for _ in range(1 + _REPEATS):
            prefiller.admit("a", prompt, pages, done=start)
            times.append(_seconds(prefiller, start, end, device))
            prefiller.release("a")
        seconds.append(statistics.median(times[1:]))
    return starts, seconds


def _seconds(prefiller: Prefiller, start: int, end: int, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    prefiller.run_chunk("a", start, end)
    synchronize(device)
    return time.perf_counter() - started


def _sampled_starts(tokens: int, chunk_tokens: int) -> list[int]:
    """Of whole chunks, from the first to the last; of the only one where it is short."""
    whole = max(1, tokens // chunk_tokens)
    numbers = np.unique(np.linspace(0, whole - 1, _SAMPLES).round().astype(int))
    return [int(number) * chunk_tokens for number in numbers]


def compute_seconds(
    tokens: int, chunk_tokens: int, starts: Sequence[int], seconds: Sequence[float]
) -> float:
    """Of all chunks of a prompt; a short last one counts by its rows."""
    total = 0.0
    for start in range(0, tokens, chunk_tokens):
        rows = min(chunk_tokens, tokens - start) / min(chunk_tokens, tokens)
        total += rows * float(np.interp(start, starts, seconds))
    return total


def _line(
    options: Options,
    config: ModelConfig,
    mesh: LoneRank,
    starts: Sequence[int],
    seconds: Sequence[float],
    alone: float | None,
) -> Line:
    tokens, chunk_tokens = options.tokens[-1], options.chunk_tokens
    traffic = Traffic.of(config, mesh, tokens, chunk_tokens, torch.bfloat16.itemsize)
    compute = compute_seconds(tokens, chunk_tokens, starts, seconds)
    gather, reduce = (
        size / (options.link_gbs * 1e9) for size in (traffic.gathered_bytes, traffic.reduced_bytes)
    )
    latency = traffic.collectives * options.latency_us * 1e-6
    ttft = compute + gather + reduce + latency
    gpus = mesh.tensor_parallel * mesh.sequence_parallel
    speedup = 1.0 if alone is None else alone / ttft
    return Line(
        model=options.name,
        tokens=tokens,
        attention="sparse" if "sparse" in options.attentions else "dense",
        tensor_parallel=mesh.tensor_parallel,
        sequence_parallel=mesh.sequence_parallel,
        gpus=gpus,
        first_chunk_measured=seconds[0],
        last_chunk_measured=seconds[-1],
        compute_modelled=compute,
        gather_modelled=gather,
        reduce_modelled=reduce,
        latency_modelled=latency,
        ttft_modelled=ttft,
        speedup_modelled=speedup,
        efficiency_modelled=speedup / gpus,
        link_gbs_assumed=options.link_gbs,
        latency_us_assumed=options.latency_us,
        environment=Environment.of_this_run(options.commit),
    )


def _give_back(device: torch.device) -> None:
    """What one mesh took must be free before the next one takes it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
