"""A matrix times a vector (on a GPU, or in Triton's interpreter) against float64."""

import pytest
import torch

from longreach.kernels import matvec
from longreach.kernels.matvec import reference, triton_matvec

from .poison import poison_fresh_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


@pytest.mark.parametrize(
    "version", [reference, triton_matvec], ids=lambda module: module.__name__.rpartition(".")[-1]
)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns"), [(64, 512), (97, 64), (130, 3584), (7, 1000), (1, 1), (36, 2048)]
)
def test_against_float64(monkeypatch, version, dtype, biased, rows, columns) -> None:
    torch.manual_seed(rows)
    poison_fresh_memory(monkeypatch)
    x = torch.randn(1, columns).to(dtype).to(DEVICE)
    # What lies behind a matrix, and between its rows, is not looked at.
    wider = torch.full((rows + 5, columns + 24), torch.nan, dtype=dtype, device=DEVICE)
    weight = wider[:rows, :columns]
    weight.copy_(torch.randn(rows, columns))
    bias = torch.randn(rows).to(dtype).to(DEVICE) if biased else None
    expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    actual = version.linear(x, weight, bias)
    assert actual.dtype == dtype
    assert actual.shape == (1, rows)
    assert (actual.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_two_rows_are_refused() -> None:
    x, weight = torch.zeros(2, 8, device=DEVICE), torch.zeros(3, 8, device=DEVICE)
    with pytest.raises(ValueError, match="takes one row, not 2"):
        triton_matvec.linear(x, weight)


def test_the_package_is_what_the_device_needs() -> None:
    x, weight = torch.randn(1, 96, device=DEVICE), torch.randn(5, 96, device=DEVICE)
    torch.testing.assert_close(matvec.linear(x, weight), x @ weight.T)
