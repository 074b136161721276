"""Products with weights, in every format that they are kept in."""

from typing import Any

import pytest
import torch

from longreach.engine.model.linear import Linear, Matrix, NarrowLinear, WideLinear
from longreach.kernels import matvec, narrow
from longreach.kernels.narrow import BLOCK, BY_ROW, Narrowing
from longreach.kernels.narrow.reference import widened

OUTPUTS, INPUTS = 384, 256
X = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1))
BIAS = torch.randn(OUTPUTS, generator=torch.Generator().manual_seed(2))

FORMATS = ["wide", "by output", "by block"]
every_format = pytest.mark.parametrize("kept", FORMATS)


def linear_of(kept: str, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    if kept == "wide":
        return Matrix(WEIGHT.to(dtype)).linear(bias)
    if kept == "by output":
        return Matrix.narrowed(WEIGHT).linear(bias)
    scales = torch.arange(1, 7).view(OUTPUTS // BLOCK, INPUTS // BLOCK) / 100
    every = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return Matrix((WEIGHT / every).to(torch.float8_e4m3fn), scales).linear(bias)


def numbers_of(linear: Linear) -> torch.Tensor:
    """The matrix that it stands for."""
    if isinstance(linear, WideLinear):
        return linear.weight.double()
    assert isinstance(linear, NarrowLinear)
    return widened(linear.weight, linear.scales).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_format
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_a_product_and_some_rows_are_those_of_the_whole(
    kept: str, biased: bool, dtype: torch.dtype
) -> None:
    bias = BIAS.to(dtype) if biased else None
    linear, x = linear_of(kept, bias, dtype), X.to(dtype)
    rows = x if linear.takes is None else narrow.narrow_rows(x, linear.takes)
    numbers = x.double() if isinstance(rows, torch.Tensor) else rows.wide().double()
    expected = numbers @ numbers_of(linear).T + (0 if bias is None else bias.double())
    whole = linear(rows)
    assert whole.dtype == dtype
    # bfloat16 has eight bits of mantissa, and sums of some hundred products are rounded to it.
    torch.testing.assert_close(whole.double(), expected, rtol=1e-2, atol=5e-2)
    # What comes as it is is narrowed first.
    assert torch.equal(linear(x), whole)
    some = linear.rows(slice(BLOCK, 2 * BLOCK))
    assert some.takes == linear.takes
    torch.testing.assert_close(some(rows), whole[:, BLOCK : 2 * BLOCK])
    torch.testing.assert_close(linear.rows(slice(BLOCK, None))(rows), whole[:, BLOCK:])


def test_views_are_no_copies() -> None:
    linear = Matrix.narrowed(WEIGHT).linear(BIAS)
    assert isinstance(linear, NarrowLinear)
    some = linear.rows(slice(5, 9))
    assert some.weight.data_ptr() == linear.weight[5:].data_ptr()
    assert some.scales.data_ptr() == linear.scales[5:].data_ptr()


def test_blocks_are_not_divided() -> None:
    linear = linear_of("by block", None, torch.float32)
    for rows in (slice(64, 128), slice(0, 100)):
        with pytest.raises(ValueError, match="no whole blocks"):
            linear.rows(rows)


def test_what_a_product_takes() -> None:
    assert [linear_of(kept, None, torch.float32).takes for kept in FORMATS] == [
        None, BY_ROW, Narrowing(BLOCK),
    ]  # fmt: skip
    with pytest.raises(TypeError):
        linear_of("wide", None, torch.float32)(narrow.narrow_rows(X))


def test_weights_lose_less_than_a_sixteenth() -> None:
    """Half a step of e4m3, which has three bits of mantissa; near 0 its steps stay as they are."""
    torch.testing.assert_close(
        numbers_of(Matrix.narrowed(WEIGHT).linear()), WEIGHT.double(), rtol=2**-4, atol=1e-4
    )


@every_format
def test_joined_matrices_are_one_below_the_other(kept: str) -> None:
    parts = [linear_of(kept, None, torch.float32) for _ in range(2)]
    matrices = [
        Matrix(part.weight, part.scales if isinstance(part, NarrowLinear) else None)
        for part in parts
        if isinstance(part, (WideLinear, NarrowLinear))
    ]
    joined = Matrix.joined(matrices).linear()
    assert torch.equal(numbers_of(joined), torch.cat([numbers_of(part) for part in parts]))


def test_one_row_goes_another_way_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    product = matvec.linear

    def spy(x: Any, *others: Any) -> torch.Tensor:
        calls.append(len(x))
        return product(x, *others)

    monkeypatch.setattr(matvec, "linear", spy)
    linear = linear_of("wide", BIAS, torch.float32)
    expected = linear(X[:1])
    assert calls == []
    alone = linear.for_one_row()
    torch.testing.assert_close(alone.rows(slice(1, 4))(X[:1]), expected[:, 1:4])
    assert calls == [1]
    narrow_one = linear_of("by output", BIAS, torch.float32)
    assert torch.equal(narrow_one.for_one_row()(X[:1]), narrow_one(X[:1]))
