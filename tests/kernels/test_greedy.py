"""Greedy sampling's kernel (on a GPU, or in Triton's interpreter) against float64."""

import pytest
import torch
from torch import Tensor

from longreach.kernels import greedy
from longreach.kernels.greedy import reference, triton_greedy

from .poison import poison_fresh_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

every_version = pytest.mark.parametrize(
    "version", [reference, triton_greedy], ids=lambda module: module.__name__.rpartition(".")[-1]
)


@pytest.fixture(autouse=True)
def poisoned_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    poison_fresh_memory(monkeypatch)


def check(logits: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
    wide = logits.double()
    # The first of the highest: torch promises it of `argmax` on every device.
    assert tokens.tolist() == wide.argmax(-1).tolist()
    expected = wide.log_softmax(-1).max(-1).values
    torch.testing.assert_close(logprobs.double(), expected, rtol=2e-6, atol=1e-6)


@every_version
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "vocab"), [(1, 97), (3, 4096), (2, 4097), (2, 152_064), (0, 9)])
def test_best_token_and_its_probability(version, dtype, count, vocab) -> None:
    """Sixteen bits leave many equals among so many tokens."""
    wider = (torch.randn(count, vocab + 8) * 5).to(dtype).to(DEVICE)
    logits = wider[:, :vocab]
    wider[:, vocab:] = 1000  # what lies behind a row is not looked at
    check(logits, *version.best_tokens(logits))


@pytest.mark.filterwarnings("ignore:invalid value")  # in the interpreter: -inf less -inf
@every_version
def test_equals_in_different_blocks_and_tokens_that_cannot_come(version) -> None:
    logits = torch.full((3, 13_000), -torch.inf, device=DEVICE)
    logits[0, [12_999, 8_500, 8_499]] = 2.0
    logits[1, 4_095:4_097] = -3.0
    logits[2, [0, 12_998]] = 90.0
    tokens, logprobs = version.best_tokens(logits)
    check(logits, tokens, logprobs)
    assert tokens.tolist() == [8_499, 4_095, 0]


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")  # in the interpreter
@every_version
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("vocab", [9_000, 97])
def test_damage_shows_in_the_probability_of_its_own_row(version, value, vocab) -> None:
    logits = torch.randn(4, vocab, device=DEVICE)
    logits[0, vocab - 2] = value
    logits[1] = -torch.inf
    logits[2] = value
    tokens, logprobs = version.best_tokens(logits)
    assert logprobs.isfinite().tolist() == [False, False, False, True]
    assert all(0 <= token < vocab for token in tokens.tolist())


def test_the_package_is_what_the_device_needs() -> None:
    logits = torch.randn(2, 500, device=DEVICE)
    check(logits, *greedy.best_tokens(logits))
