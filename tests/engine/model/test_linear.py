"""Products with weights, in every format that they are kept in."""

import pytest
import torch

from longreach.engine.model.linear import Linear
from longreach.kernels import matvec

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
BIAS = torch.randn(6, generator=torch.Generator().manual_seed(2))


def kept(scaled: bool, biased: bool) -> tuple[Linear, torch.Tensor]:
    """A linear layer, and the matrix that it stands for."""
    bias = BIAS if biased else None
    if not scaled:
        return Linear(WEIGHT, bias=bias), WEIGHT
    scale = WEIGHT.abs().amax(1) / 448
    narrow = (WEIGHT / scale[:, None]).to(torch.float8_e4m3fn)
    return Linear(narrow, scale, bias), narrow.float() * scale[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_a_product_and_some_rows_are_those_of_the_whole(
    scaled: bool, biased: bool, dtype: torch.dtype
) -> None:
    linear, matrix = kept(scaled, biased)
    x = X.to(dtype)
    if dtype != torch.float32:
        weight = linear.weight if scaled else linear.weight.to(dtype)
        bias = None if linear.bias is None else linear.bias.to(dtype)
        linear = Linear(weight, linear.scale, bias)
    expected = x.double() @ matrix.to(dtype).double().T + (BIAS.to(dtype) if biased else 0)
    whole = linear(x)
    assert whole.dtype == dtype
    # bfloat16 has eight bits of mantissa, and sums of some dozen products are rounded to it.
    torch.testing.assert_close(whole.double(), expected, rtol=1e-2, atol=2e-2)
    some = linear.rows(slice(2, 5))
    assert some.weight.data_ptr() == linear.weight[2:].data_ptr()
    torch.testing.assert_close(some(x), whole[:, 2:5])


@pytest.mark.parametrize("scaled", [False, True])
def test_one_row_goes_another_way_to_the_same(
    monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    calls: list[int] = []
    product = matvec.linear

    def spy(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(len(x))
        return product(x, weight, bias)

    monkeypatch.setattr(matvec, "linear", spy)
    linear, _ = kept(scaled, biased=True)
    expected = linear(X[:1])
    assert calls == []
    alone = linear.for_one_row()
    assert alone.weight.data_ptr() == linear.weight.data_ptr()
    torch.testing.assert_close(alone.rows(slice(1, 4))(X[:1]), expected[:, 1:4])
    assert calls == [1]
