"""Drawing on the device (on a GPU, or in Triton's interpreter) against the host's definition."""

from typing import Any

import numpy as np
import pytest
import torch

from longreach.kernels.sampling import (
    MASKED,
    PENALIZED,
    Adjustments,
    RowInputs,
    reference,
    triton_sampling,
)
from longreach.kernels.sampling import sample as chosen_for_the_device

from .poison import poison_fresh_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
VOCAB = 9000 if ON_GPU else 4700
"""Three blocks, the last of them short; two in the interpreter, where each takes its time."""
EVERYTHING: dict[str, Any] = {"temperature": 1.0, "top_k": VOCAB, "top_p": 1.0, "min_p": 0.0}

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.6, "top_p": 0.95, "top_k": 300},
    {"top_k": 1},
    {"top_k": 7, "temperature": 3.0},
    {"min_p": 0.1},
    {"min_p": 0.02, "top_p": 0.9, "top_k": 2000, "temperature": 0.9},
    {"top_p": 1e-6},
    {"temperature": 1e-3},
]


@pytest.fixture(autouse=True)
def poisoned_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    poison_fresh_memory(monkeypatch)


def inputs_of(rows: list[dict[str, Any]]) -> RowInputs:
    host = RowInputs.allocate(len(rows), torch.device("cpu"))
    for index, row in enumerate(rows):
        host.set(index, **{**EVERYTHING, "draw": 0.5, **row})
    return RowInputs(host.storage.to(DEVICE))


def no_adjustments(rows: int) -> Adjustments:
    return Adjustments.allocate(rows, VOCAB, DEVICE)


def logits_of(rows: int, spread: float, dtype: torch.dtype) -> torch.Tensor:
    wider = torch.full((rows, VOCAB + 16), torch.nan)
    wider[:, :VOCAB] = torch.randn(rows, VOCAB) * spread
    wider[:, VOCAB - 10 : VOCAB] = -torch.inf
    return wider.to(dtype).to(DEVICE)[:, :VOCAB]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "spread"), [(torch.bfloat16, 0.3), (torch.float32, 3.0)])
def test_the_device_draws_what_the_host_draws(
    dtype: torch.dtype, spread: float, every: bool
) -> None:
    """Logits of 8 bits of mantissa have many equals."""
    every = every or ON_GPU
    draws = np.random.default_rng(1).random((4 if every else 1, len(KINDS)))
    if every:
        draws[0, :], draws[1, :] = 0.0, 1 - 2**-53
    else:  # in the interpreter each in turn, and other ones of the other type
        kinds = np.arange(len(KINDS)) + (dtype == torch.float32)
        draws[0, kinds % 3 == 0], draws[0, kinds % 3 == 1] = 0.0, 1 - 2**-53
    same = 0
    for own in draws:
        rows = [{**kind, "draw": draw} for kind, draw in zip(KINDS, own, strict=True)]
        logits = logits_of(len(rows), spread, dtype)
        tokens, logprobs = triton_sampling.sample(
            logits, inputs_of(rows), no_adjustments(len(rows))
        )
        assert tokens.dtype == torch.int32
        expected = logits.float().log_softmax(-1).gather(-1, tokens.long()[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=1e-4)
        for index, row in enumerate(rows):
            asked = {**EVERYTHING, **row}
            values = logits[index].float().cpu().numpy()
            theirs = reference.draw_token(values, **asked)
            same += int(tokens[index]) == theirs
            # Weights are rounded on the device: a draw at a border may fall on either side.
            near = {
                reference.draw_token(values, **{**asked, "draw": max(0.0, asked["draw"] + off)})
                for off in (-1e-5, 0.0, 1e-5 if asked["draw"] < 0.9 else 0.0)
            }
            assert int(tokens[index]) in near, (row, theirs)
    assert same >= 0.9 * draws.size


def test_equals_are_left_by_the_lowest_ids() -> None:
    """Of thousands of equals, in several blocks, top-k and top-p leave the first."""
    logits = torch.zeros(2, VOCAB, device=DEVICE)
    logits[:, 100:4100] = -1.0
    for draw in (0.0, 0.3, 0.999999):
        rows = [{"top_k": 400, "draw": draw}, {"top_p": 0.5, "draw": draw}]
        tokens, _ = triton_sampling.sample(logits, inputs_of(rows), no_adjustments(2))
        theirs = [
            reference.draw_token(np.asarray(logits[0].cpu()), **{**EVERYTHING, **row})
            for row in rows
        ]
        assert np.abs(tokens.cpu().numpy() - theirs).max() <= 1
    assert theirs[0] == 4399


def test_frequencies_follow_the_weights() -> None:
    logits = torch.full((1, VOCAB), -torch.inf, device=DEVICE)
    logits[0, [5, 4096, VOCAB - 1]] = torch.log(torch.tensor([0.2, 0.5, 0.3], device=DEVICE))
    drawn = [
        int(triton_sampling.sample(logits, inputs_of([{"draw": d}]), no_adjustments(1))[0])
        for d in (0.05, 0.19, 0.21, 0.69, 0.71, 0.99)
    ]
    assert drawn == [5, 5, 4096, 4096, VOCAB - 1, VOCAB - 1]


def adjusted() -> tuple[list[dict[str, Any]], Adjustments]:
    """Rows of every kind of adjustment, over counts that hold something already."""
    adjustments = no_adjustments(4)
    generator = torch.Generator().manual_seed(3)
    adjustments.bias.copy_(torch.randn(4, VOCAB, generator=generator) * 2)
    adjustments.answered.copy_(torch.randint(0, 3, (4, VOCAB), generator=generator))
    adjustments.seen.copy_((torch.rand(4, VOCAB, generator=generator) < 0.5).to(torch.uint8))
    words = torch.randint(-(2**31), 2**31, (4, -(-VOCAB // 32)), generator=generator)
    adjustments.mask.copy_(words.int())
    common = {"repetition": 1.3, "frequency": 0.4, "presence": 0.7}
    return [
        {"flags": PENALIZED, **common, "newest": VOCAB - 2, "times": 5, "top_k": 1},
        {"flags": MASKED, "top_p": 0.7, "draw": 0.4},
        {"flags": PENALIZED | MASKED, **common, "draw": 0.6},
        {"draw": 0.1},
    ], adjustments


def test_adjustments_are_those_of_the_definition() -> None:
    rows, mine = adjusted()
    _, theirs = adjusted()
    logits = logits_of(4, 2.0, torch.float32)
    logits[0, VOCAB - 2] = 14.0
    tokens = torch.empty(0)
    for _ in range(2):  # what is brought up to date is so again
        tokens, logprobs = triton_sampling.sample(logits, inputs_of(rows), mine)
        expected, expected_logprobs = reference.sample(logits, inputs_of(rows), theirs)
        assert tokens.tolist() == expected.tolist()
        torch.testing.assert_close(logprobs, expected_logprobs, atol=1e-4, rtol=1e-4)
    assert torch.equal(mine.answered, theirs.answered)
    assert torch.equal(mine.seen, theirs.seen)
    assert (float(mine.answered[0, VOCAB - 2]), int(mine.seen[0, VOCAB - 2])) == (5.0, 1)
    allowed = reference.allowed_by(mine.mask[1].cpu().numpy(), VOCAB)
    assert allowed[int(tokens[1])]
    assert 0.4 < allowed.mean() < 0.6


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:divide by zero")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_rows_are_told_by_their_probability(value: float) -> None:
    logits = logits_of(3, 1.0, torch.float32)
    logits[1, 4000] = value
    logits[2] = -torch.inf
    tokens, logprobs = triton_sampling.sample(logits, inputs_of([{}] * 3), no_adjustments(3))
    assert logprobs.isfinite().tolist() == [True, False, False]
    assert ((tokens >= 0) & (tokens < VOCAB)).all()


def test_no_rows() -> None:
    tokens, logprobs = triton_sampling.sample(
        torch.zeros(0, VOCAB, device=DEVICE), inputs_of([]), no_adjustments(1)
    )
    assert (len(tokens), len(logprobs)) == (0, 0)


def test_the_package_is_what_the_device_needs() -> None:
    logits = logits_of(2, 2.0, torch.bfloat16)
    rows = inputs_of([{"draw": 0.25, "top_p": 0.6}, {"top_k": 1}])
    tokens, _ = chosen_for_the_device(logits, rows, no_adjustments(2))
    assert int(tokens[1]) == int(logits[1].float().argmax())
