"""Timing, ceilings of the device, and a line of the table."""

import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import triton

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds by device events: the 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, run: Run, repeats: int, warm_up: int = 2) -> "Timing":
        """Time `run` so many times, one after the other."""
        for _ in range(warm_up):
            run()
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        if len(times) == 1:
            return cls(times[0], times[0], times[0])
        cuts = statistics.quantiles(times, n=10, method="inclusive")
        return cls(cuts[1], statistics.median(times), cuts[7])

    @classmethod
    def mean(cls, timings: "list[Timing]") -> "Timing":
        """Of several cases that count as one."""
        count = len(timings)
        return cls(*(sum(getattr(each, f.name) for each in timings) / count for f in fields(cls)))

    def plus(self, other: "Timing") -> "Timing":
        """Of one after the other."""
        return Timing(self.p20 + other.p20, self.p50 + other.p50, self.p80 + other.p80)


def captured(run: Run) -> Run:
    """`run` as a CUDA graph, so that launches by the host are not part of its time."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at best: TFLOP/s of a matrix product, GB/s read, GB/s copied."""

    tflops: float
    read: float
    copy: float

    @classmethod
    def measure(cls, device: torch.device) -> "Ceilings":
        """8192³ in bfloat16; a sum over 1 GiB; a copy of 1 GiB, read and write counted."""
        a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
        product = Timing.of(lambda: a @ b, 20, 5).p50
        source = torch.randn(2**28, device=device)
        target = torch.empty_like(source)
        copy = Timing.of(lambda: target.copy_(source), 20, 3).p50
        read = Timing.of(lambda: source.sum(), 20, 3).p50
        size = source.numel() * 4
        return cls(2 * 8192**3 / product / 1e9, size / read / 1e6, 2 * size / copy / 1e6)


@dataclass(frozen=True)
class Line:
    """One measured operation. `fraction` is of the ceiling that binds, `ratio` baseline / ours."""

    operation: str
    shape: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rate: float
    unit: str
    fraction: float
    baseline: str
    ratio: float | None
    error: float
    note: str
    gpu: str
    torch: str
    triton: str
    commit: str

    def text(self) -> str:
        """For the terminal."""
        ratio = "" if self.ratio is None else f"{self.ratio:7.2f}x {self.baseline}"
        return (
            f"{self.operation:34} {self.shape:30} {self.p50_ms:9.3f} ms {self.rate:8.0f} "
            f"{self.unit:8} {self.fraction:5.2f} {ratio:18} {self.note}"
        )


def environment(commit: str | None) -> dict[str, str]:
    """The last columns of every line."""
    if commit is None and shutil.which("git") is None:
        commit = "unknown"
    if commit is None:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
        commit = found.stdout.strip() or "unknown"
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
    }
