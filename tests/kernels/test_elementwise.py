"""Fused elementwise kernels (on a GPU, or in Triton's interpreter) against float64."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from longreach.kernels import elementwise
from longreach.kernels.dual_chunk.segments import Rotation, rotation
from longreach.kernels.elementwise import reference, triton_elementwise

from .poison import poison_fresh_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPSILON = 1e-6
VERSIONS = [reference, triton_elementwise]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
TYPES = list(TOLERANCE)

every_version = pytest.mark.parametrize(
    "version", VERSIONS, ids=lambda module: module.__name__.rpartition(".")[-1]
)
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


@pytest.fixture(autouse=True)
def poisoned_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    poison_fresh_memory(monkeypatch)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = actual.double() - expected.double()
    assert error.norm() <= TOLERANCE[dtype] * expected.double().norm()


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return weight.double() * wide / (wide.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def exact_rotation(vectors: Tensor, angles: Rotation) -> Tensor:
    """As complex numbers of the two halves."""
    first, second = vectors.double().chunk(2, -1)
    turn = torch.complex(angles.cosine.double(), angles.sine.double())[:, None]
    turned = torch.complex(first, second) * turn
    return torch.cat((turned.real, turned.imag), -1)


@every_version
@every_type
@pytest.mark.parametrize(
    ("count", "hidden"), [(1, 256), (63, 256), (111, 256), (3, 3584), (2, 5120), (0, 256)]
)
def test_norms(version, dtype, count, hidden) -> None:
    # Rows that begin apart, as in a slice of a wider tensor.
    x = random(count, hidden + 16, dtype=dtype)[:, :hidden]
    residual = random(count, hidden, dtype=dtype) * 30
    weight = random(hidden, dtype=dtype)
    check(version.rms_norm(x, weight, EPSILON), exact_norm(x, weight), dtype)
    normed, total = version.add_rms_norm(x, residual, weight, EPSILON)
    assert torch.equal(total, residual + x)
    check(normed, exact_norm(residual + x, weight), dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # it is meant to: 1 / inf is 0
@every_version
@every_type
@pytest.mark.parametrize(
    ("count", "columns"), [(1, 768), (63, 768), (2, 18944), (3, 13824), (0, 768)]
)
def test_swiglu(version, dtype, count, columns) -> None:
    gate_up = random(count, 2 * columns, dtype=dtype) * 3
    gate_up[:1, :2] = torch.tensor([-300.0, 300.0])
    gate, up = gate_up.double().chunk(2, -1)
    check(version.swiglu(gate_up), gate * gate.sigmoid() * up, dtype)


@every_version
@every_type
@pytest.mark.parametrize(
    ("count", "heads", "head_dim"),
    [(1, 28, 128), (63, 4, 64), (5, 40, 128), (7, 7, 64), (0, 4, 64)],
)
def test_queries_are_rotated_for_three_segments(version, dtype, count, heads, head_dim) -> None:
    fused = random(count, heads + 3, head_dim, dtype=dtype)
    q = fused[:, 1 : heads + 1]
    positions = torch.arange(count, device=DEVICE) * 77
    turns = [rotation(positions + 1000 * segment, head_dim, 1e4) for segment in range(3)]
    rotated = version.rotate_queries(q, *turns)
    for result, turn in zip(vars(rotated).values(), turns, strict=True):
        check(result, exact_rotation(q, turn), dtype)


@every_version
def test_one_rotation_is_written_once(version) -> None:
    q = random(5, 4, 64, dtype=torch.bfloat16)
    first, second = (rotation(torch.arange(5, device=DEVICE) + n, 64, 1e4) for n in (0, 9))
    plain = version.rotate_queries(q, first, first, first)
    assert plain.successive is plain.intra
    assert plain.inter is plain.intra
    check(plain.intra, exact_rotation(q, first), torch.bfloat16)
    mixed = version.rotate_queries(q, first, first, second)
    assert mixed.successive is mixed.intra
    check(mixed.inter, exact_rotation(q, second), torch.bfloat16)


@every_version
@every_type
@pytest.mark.parametrize(
    ("count", "kv_heads", "head_dim"),
    [(1, 4, 128), (63, 2, 64), (200, 1, 64), (9, 8, 128), (0, 2, 64)],
)
def test_keys_and_values_reach_their_slots_and_nothing_else_does(
    version, dtype, count, kv_heads, head_dim
) -> None:
    memory = torch.full((6, kv_heads, 2, 128, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    fused = random(count, 2 * kv_heads, head_dim, dtype=dtype)
    k, v = fused[:, :kv_heads], fused[:, kv_heads:]
    slots = torch.randperm(6 * 128)[:count].to(DEVICE)
    slots[2::5] = -1
    turn = rotation(torch.arange(count, device=DEVICE) * 31, head_dim, 1e4)
    version.write_pages(memory, slots, k, v, turn)
    by_slot = memory.transpose(1, 3).reshape(6 * 128, 2, kv_heads, head_dim)
    written = slots >= 0
    check(by_slot[slots[written], 0], exact_rotation(k, turn)[written], dtype)
    assert torch.equal(by_slot[slots[written], 1], v[written])
    others = torch.ones(6 * 128, dtype=torch.bool, device=DEVICE)
    others[slots[written]] = False
    assert by_slot[others].isnan().all()


@every_type
def test_both_versions_round_at_the_same_places(dtype) -> None:
    x, residual = (random(63, 256, dtype=dtype) for _ in range(2))
    weight = random(256, dtype=dtype)
    pairs = [
        (module.add_rms_norm(x, residual, weight, EPSILON)[0], module.swiglu(x))
        for module in VERSIONS
    ]
    for mine, theirs in zip(*pairs, strict=True):
        differ = (mine != theirs).double().mean()
        # In float32 the order of sums shows; once rounded, two ways of rounding would show in a
        # third of all numbers.
        assert dtype == torch.float32 or differ < 0.01


def test_the_package_serves_cpus_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from longreach.kernels import elementwise\n"
        "x = torch.ones(2, 16)\n"
        "print(elementwise.rms_norm(x, x[0], 1e-6).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(32, rel=1e-5)


def test_the_package_is_what_the_device_needs() -> None:
    x = random(5, 256, dtype=torch.bfloat16)
    weight = random(256, dtype=torch.bfloat16)
    check(elementwise.rms_norm(x, weight, EPSILON), exact_norm(x, weight), torch.bfloat16)
