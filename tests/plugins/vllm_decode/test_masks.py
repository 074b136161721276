"""Masks as vLLM's structured outputs take them: `make test-vllm`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from longreach.plugins.vllm_decode.errors import UnaskedError
from longreach.plugins.vllm_decode.held_to import HeldTo

if TYPE_CHECKING:
    from longreach.plugins.vllm_decode.masks import SequenceMasks

pytestmark = pytest.mark.live


def masks_of(*replayed: int) -> "SequenceMasks":
    from longreach.plugins.vllm_decode.masks import SequenceMasks

    return SequenceMasks(HeldTo(replayed))


def test_tokens_that_the_client_has_are_all_that_may_come_and_then_anything() -> None:
    masks = masks_of(33, 2)
    bits = torch.full((2, 2), -1, dtype=torch.int32)
    masks.fill_bitmask(bits, 1)
    assert bits.tolist() == [[-1, -1], [0, 2]]
    assert masks.accept_tokens("a", [33])
    assert not masks.is_terminated()
    masks.fill_bitmask(bits, 0)
    assert bits.tolist() == [[4, 0], [0, 2]]
    assert masks.accept_tokens("a", [2])
    assert masks.is_terminated()


@pytest.mark.parametrize(
    "ask", [lambda masks: masks.rollback(1), lambda masks: masks.reset()], ids=["rollback", "reset"]
)
def test_what_vllm_never_asks_for_is_an_error_that_says_so(
    ask: Callable[["SequenceMasks"], None],
) -> None:
    masks = masks_of(33)
    with pytest.raises(UnaskedError):
        ask(masks)
    assert not masks.is_terminated()
