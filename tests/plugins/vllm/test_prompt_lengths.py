"""Of which sequences the length of a prompt must be known; vLLM is not needed."""

import numpy as np
import pytest
import torch

from longreach.plugins.vllm.errors import UnknownPromptError
from longreach.plugins.vllm.prompt_lengths import prompt_lengths

NOWHERE = -1


def lengths(said: list[int], counts: list[int], slots: list[int]) -> list[int]:
    first_rows = np.concatenate(([0], np.cumsum(counts)))
    return prompt_lengths(np.array(said, dtype=np.int64), first_rows, torch.tensor(slots)).tolist()


def test_they_are_what_was_said_of_the_sequences_of_a_step() -> None:
    """Where graphs are padded, sequences without rows follow; runners may say more than that."""
    assert lengths([5, 90], [1, 2, 0], [7, 8, 9]) == [5, 90, 0]
    assert lengths([5, 90, 3, 4], [1, 2], [7, 8, 9]) == [5, 90]


@pytest.mark.parametrize("said", [[], [0, 0, 0], [5], [5, 0, 2]])
def test_a_sequence_whose_rows_are_kept_must_have_one(said: list[int]) -> None:
    with pytest.raises(UnknownPromptError) as refused:
        lengths(said, [1, 2, 1], [640, 128, 129, 0])
    assert refused.value.sequence == (1 if said[:1] == [5] else 0)
    assert "install a vLLM that the plugin was tried with" in str(refused.value)


@pytest.mark.parametrize("said", [[], [0, 0, 0], [5, 0, 40]])
def test_sequences_that_are_made_up_need_none(said: list[int]) -> None:
    """As they are when graphs are captured; what is said of them then is another's."""
    assert lengths(said, [1, 1, 2], [NOWHERE] * 4) == (said or [0, 0, 0])


def test_one_that_is_made_up_does_not_excuse_another() -> None:
    with pytest.raises(UnknownPromptError) as refused:
        lengths([], [1, 1], [NOWHERE, 3])
    assert refused.value.sequence == 1
