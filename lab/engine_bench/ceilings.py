"""What the device reaches at best, measured in the same run as what it is compared with."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from ...engine.model.linear import Matrix
from ...kernels.narrow import narrow_rows
from ..kernel_bench import measure
from .work import Work

_SQUARE = {"cuda": 8192, "cpu": 256}
_MOST_ROWS = {"cuda": 2**20, "cpu": 256}
_READ_ELEMENTS = {"cuda": 2**28, "cpu": 2**24}


@dataclass(frozen=True)
class Ceilings:
    """TFLOP/s of a square product (8192³ on a GPU) and of the model's own, GB/s read.

    `linear` is of the model's own with weights as it keeps them, `products` in the type that it
    computes in.
    """

    square: float
    products: float
    linear: float
    read: float

    @classmethod
    def measure(cls, work: Work, rows: int, dtype: torch.dtype, device: torch.device) -> "Ceilings":
        """Products of the model's own shapes have `rows` rows; each counts by its operations."""
        size, rows = _SQUARE[device.type], min(rows, _MOST_ROWS[device.type])
        products = _products_rate(work, rows, dtype, device, narrow=False)
        linear = products
        if work.weights.narrow:
            linear = _products_rate(work, rows, dtype, device, narrow=True)
        square = 2.0 * size**3 / _product_seconds(size, size, size, dtype, device, False)
        source = torch.ones(_READ_ELEMENTS[device.type], device=device)
        read = 4.0 * source.numel() / median_seconds(source.sum, device)
        return cls(square / 1e12, products, linear, read / 1e9)


def _products_rate(
    work: Work, rows: int, dtype: torch.dtype, device: torch.device, narrow: bool
) -> float:
    """TFLOP/s of a layer's products, each of which counts by its operations."""
    shapes = work.weights.products
    seconds = [_product_seconds(rows, *shape, dtype, device, narrow) for shape in shapes]
    flops = sum(2.0 * rows * outputs * inputs for outputs, inputs in shapes)
    return flops / sum(seconds) / 1e12


def _product_seconds(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device, narrow: bool
) -> float:
    """Of one product of normally distributed matrices: zeros would take less power.

    Where it is `narrow`, of 8 bits, with its rows narrowed already.
    """
    x = torch.randn(rows, inputs, dtype=dtype, device=device)
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
    if not narrow:
        return median_seconds(lambda: functional.linear(x, weight), device)
    linear, narrowed = Matrix.narrowed(weight).linear(), narrow_rows(x)
    return median_seconds(lambda: linear(narrowed), device)


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """By the device's events on a GPU, else by the host's clock."""
    if device.type == "cuda":
        return measure.Timing.of(run, repeats, 5).p50 / 1e3
    run()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
