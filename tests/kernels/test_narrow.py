"""Matrices of 8 bits (on a GPU, or in Triton's interpreter) against float64."""

import pytest
import torch
from torch import Tensor

from longreach.kernels import elementwise, narrow
from longreach.kernels.elementwise import reference as elementwise_reference
from longreach.kernels.elementwise import triton_elementwise
from longreach.kernels.narrow import BLOCK, BY_ROW, Narrowing, NarrowRows, reference, triton_narrow

from .poison import poison_fresh_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = [torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32, torch.bfloat16]
BY_GROUP = Narrowing(BLOCK)

every_narrowing = pytest.mark.parametrize("narrowing", [BY_ROW, BY_GROUP], ids=["row", "group"])
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
every_version = pytest.mark.parametrize(
    "version", [reference, triton_narrow], ids=["definition", "kernel"]
)


@pytest.fixture(autouse=True)
def poisoned_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    poison_fresh_memory(monkeypatch)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def check_same(actual: NarrowRows, expected: NarrowRows) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.scales, expected.scales, rtol=1e-5, atol=0)
    assert actual.scales.shape == expected.scales.shape
    different = actual.values.float() != expected.values.float()
    # A sum in another order may put a number on another side of a border between two values.
    assert different.sum() <= 0.01 * different.numel()
    if len(actual):
        step = float(expected.scales.max()) * 2**-9
        torch.testing.assert_close(actual.wide(), expected.wide(), rtol=0.13, atol=1.1 * step)


@every_version
@every_type
@every_narrowing
@pytest.mark.parametrize(("count", "columns"), [(1, 128), (7, 384), (3, 3584), (2, 4736), (0, 256)])
def test_the_largest_of_each_group_is_448(version, dtype, narrowing, count, columns) -> None:
    x = random(count, columns + 16, dtype=dtype)[:, :columns] * 1000
    x[:1] = 0
    rows = version.narrow_rows(x, narrowing)
    assert rows.values.dtype == torch.float8_e4m3fn
    assert rows.dtype == dtype
    groups = narrowing.groups(columns)
    assert rows.scales.shape == (count, groups)
    largest = rows.values.float().view(count, groups, columns // groups).abs().amax(-1)
    assert (largest[1:] == 448).all()
    assert (largest[:1] == 0).all()
    wide = x.float()
    # Three bits of mantissa; below 2^-6 of a scale's unit numbers are no longer relative.
    torch.testing.assert_close(rows.wide(), wide, rtol=2**-4, atol=2)
    if count > 1:
        check_same(rows, reference.narrow_rows(x, narrowing))


@every_version
@every_narrowing
def test_what_is_not_finite_stays_so(version, narrowing) -> None:
    x = random(3, 256)
    x[0, 5], x[1, 200] = torch.nan, torch.inf
    wide = version.narrow_rows(x, narrowing).wide()
    assert not wide[:2].isfinite().all(-1).any()
    assert wide[2].isfinite().all()


def test_groups_are_whole() -> None:
    with pytest.raises(ValueError, match="200 columns"):
        BY_GROUP.groups(200)


@every_narrowing
def test_rows_are_cut_and_joined(narrowing) -> None:
    rows = narrow.narrow_rows(random(9, 256), narrowing)
    joined = NarrowRows.joined([rows[:4], rows[4:5], rows[5:]])
    assert len(joined) == 9
    assert torch.equal(joined.wide(), rows.wide())


@every_type
@every_narrowing
@pytest.mark.parametrize(("count", "hidden"), [(1, 256), (63, 256), (3, 3584), (0, 256)])
def test_fused_norms_are_the_norms_narrowed(dtype, narrowing, count, hidden) -> None:
    x = random(count, hidden + 16, dtype=dtype)[:, :hidden]
    residual, weight = random(count, hidden, dtype=dtype) * 30, random(hidden, dtype=dtype)
    for arguments in ((x, weight, 1e-6, narrowing), (x.contiguous(), weight, 1e-6, narrowing)):
        check_same(
            triton_elementwise.narrow_rms_norm(*arguments),
            elementwise_reference.narrow_rms_norm(*arguments),
        )
    arguments = (x, residual, weight, 1e-6, narrowing)
    mine, total = triton_elementwise.narrow_add_rms_norm(*arguments)
    theirs, expected = elementwise_reference.narrow_add_rms_norm(*arguments)
    assert torch.equal(total, expected)
    check_same(mine, theirs)
    check_same(elementwise.narrow_add_rms_norm(*arguments)[0], theirs)


@every_type
@every_narrowing
@pytest.mark.parametrize(("count", "columns"), [(1, 768), (63, 768), (2, 18944), (0, 768)])
def test_fused_swiglu_is_swiglu_narrowed(dtype, narrowing, count, columns) -> None:
    gate_up = random(count, 2 * columns, dtype=dtype) * 3
    theirs = elementwise_reference.narrow_swiglu(gate_up, narrowing)
    check_same(triton_elementwise.narrow_swiglu(gate_up, narrowing), theirs)
    check_same(elementwise.narrow_swiglu(gate_up, narrowing), theirs)


def kept(outputs: int, inputs: int, narrowing: Narrowing) -> tuple[Tensor, Tensor]:
    """Weights and their scales; what lies behind the matrix is not looked at."""
    matrix = random(outputs, inputs) * torch.linspace(0.1, 3, outputs, device=DEVICE)[:, None]
    if narrowing is BY_ROW:
        rows = reference.narrow_rows(matrix, BY_ROW)
        return rows.values, rows.scales[:, 0]
    blocks = -(-outputs // BLOCK), inputs // BLOCK
    scales = random(*blocks).abs() / 100 + 1e-3
    every = scales.repeat_interleave(BLOCK, 0)[:outputs].repeat_interleave(BLOCK, 1)
    return (matrix / every).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def exact(x: NarrowRows, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Element by element, in float64."""
    every = scales.double()
    if every.dim() == 1:
        every = every[:, None].expand(weight.shape)
    else:
        row, column = (torch.arange(n, device=DEVICE) // BLOCK for n in weight.shape)
        every = every[row][:, column]
    product = x.wide().double() @ (weight.double() * every).T
    return product if bias is None else product + bias.double()


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


@every_version
@every_type
@every_narrowing
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("count", "outputs", "inputs"),  # of few rows; by a kernel, and by the library
    [(1, 64, 256), (1, 97, 3584), (3, 272, 128), (32, 144, 384), (65, 400, 640), (130, 208, 1024),
     (90, 256, 512), (92, 256, 512), (0, 64, 256)],
)  # fmt: skip
def test_products(version, dtype, narrowing, biased, count, outputs, inputs) -> None:
    if count > 32 and dtype == torch.float32 and version is triton_narrow and narrowing is BY_ROW:
        pytest.skip("the library's product gives float32 on GPUs only where scales are of tensors")
    x = reference.narrow_rows(random(count, inputs, dtype=dtype) * 5, narrowing)
    weight, scales = kept(outputs, inputs, narrowing)
    bias = random(outputs, dtype=dtype) if biased else None
    expected = exact(x, weight, scales, bias)
    actual = version.linear(x, weight, scales, bias)
    assert actual.dtype == dtype
    assert actual.shape == (count, outputs)
    assert (actual.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@every_type
def test_rows_cut_out_of_others_are_multiplied(dtype) -> None:
    """Their scales lie as far apart as those of all."""
    x = reference.narrow_rows(random(150, 512, dtype=dtype), BY_GROUP)
    x = NarrowRows(x.values, x.scales.t().contiguous().t(), dtype)
    weight, scales = kept(256, 512, BY_GROUP)
    for rows in (slice(-1, None), slice(3, 9), slice(7, 80)):
        expected = exact(x[rows], weight, scales, None)
        actual = triton_narrow.linear(x[rows], weight, scales)
        assert (actual.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
