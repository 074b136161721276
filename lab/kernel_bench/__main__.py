"""The command line of the benchmarks."""

import argparse
from pathlib import Path

import torch

from ..csv_lines import append
from .cases import CASES, Result
from .measure import Ceilings, Line, environment
from .plot import plot


def main() -> None:
    """Measure, print a table, and add to a CSV file."""
    parser = argparse.ArgumentParser(prog="python -m longreach.lab.kernel_bench")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--csv", type=Path, default=Path("docs/kernels/bench.csv"))
    parser.add_argument("--budgets", type=Path, help="a sparse_attention_config.json of the 7B")
    parser.add_argument("--commit", help="what to call the code, where there is no git")
    parser.add_argument("--plot", type=Path, help="only draw the CSV file, as this picture")
    chosen = parser.parse_args()
    if chosen.plot is not None:
        plot(chosen.csv, chosen.plot)
        return
    if not torch.cuda.is_available():
        parser.error("the kernels' benchmarks need a GPU; their tests run without one")
    device = torch.device("cuda")
    named = environment(chosen.commit)
    ceilings = Ceilings.measure(device)
    print(f"{named['gpu']}, torch {named['torch']}, triton {named['triton']}: {ceilings}")
    failed = False
    for case in chosen.cases:
        for result in CASES[case](device, chosen.budgets):
            if not result.passed:
                failed = True
                print(f"{result.operation} {result.shape}: WRONG, {result.error:.2g}; no speed")
                continue
            line = to_line(result, ceilings, named)
            print(line.text(), flush=True)
            append(chosen.csv, [line])
        torch.cuda.empty_cache()
    raise SystemExit(1 if failed else 0)


def to_line(result: Result, ceilings: Ceilings, named: dict[str, str]) -> Line:
    """A result, against this run's ceilings."""
    ratio = None
    if result.baseline_ms is not None:
        ratio = result.baseline_ms / result.timing.p50
    return Line(
        result.operation, result.shape, result.timing.p20, result.timing.p50, result.timing.p80,
        result.rate, result.unit, result.fraction(ceilings), result.baseline, ratio, result.error,
        result.note, **named,
    )  # fmt: skip


if __name__ == "__main__":
    main()
