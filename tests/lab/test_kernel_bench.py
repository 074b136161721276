"""What of the benchmarks works without a GPU: lines, the file they go to, and its picture."""

import csv
from pathlib import Path

from longreach.lab.csv_lines import append
from longreach.lab.kernel_bench.measure import Line, Timing
from longreach.lab.kernel_bench.plot import plot


def line(shape: str, ratio: float | None) -> Line:
    return Line(
        "dense", shape, 1.0, 2.0, 3.0, 500.0, "TFLOP/s", 0.7, "cuDNN" if ratio else "", ratio,
        1e-3, "", "a GPU", "2.11", "3.6", "abc",
    )  # fmt: skip


def test_lines_are_added_to_one_file_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.csv"
    append(path, [line("128K", 0.9), line("1M", None)])
    append(path, [line("128K", 1.04)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["shape"], row["ratio"]) for row in rows] == [
        ("128K", "0.9"), ("1M", ""), ("128K", "1.04"),
    ]  # fmt: skip
    picture = tmp_path / "bench.svg"
    plot(path, picture)
    assert "<svg" in picture.read_text("utf-8")


def test_timings_add_up() -> None:
    mean = Timing.mean([Timing(1, 2, 3), Timing(3, 4, 5)])
    assert mean == Timing(2, 3, 4)
    assert mean.plus(Timing(1, 1, 1)) == Timing(3, 4, 5)
