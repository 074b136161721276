"""Whose the rows of a step are."""

import numpy as np
import pytest

from longreach.plugins.vllm.step_plan import Piece, StepPlan


def plan(counts: list[int], ends: list[int], prompts: list[int]) -> StepPlan:
    first_rows = np.concatenate(([0], np.cumsum(counts)))
    return StepPlan.of(first_rows, np.array(ends), np.array(prompts))


def test_single_rows_come_first_and_pieces_follow() -> None:
    found = plan([1, 1, 30, 1], [9, 40, 30, 8], [5, 41, 90, 8])
    assert found.ends == [9, 40]
    assert found.lengths == [9, 41]
    assert found.pieces == (
        Piece(2, 2, 0, 30, 90, is_prompt=True),
        Piece(3, 32, 7, 8, 8, is_prompt=True),
    )
    assert found.rows == 33
    assert found.longest == 40


def test_rows_without_a_sequence_have_no_tokens() -> None:
    found = plan([1, 0, 0], [7, 0, 0], [3, 0, 0])
    assert found.ends == [7, 0, 0]
    assert found.lengths[0] == 7
    assert min(found.lengths) > 0
    assert found.pieces == ()


def test_a_piece_is_cut_where_its_prompt_ends() -> None:
    found = plan([50], [120], [100])
    assert found.pieces == (
        Piece(0, 0, 70, 100, 100, is_prompt=True),
        Piece(0, 30, 100, 120, 120, is_prompt=False),
    )


@pytest.mark.parametrize("prompt", [0, 60])
def test_what_was_generated_is_no_prompt(prompt: int) -> None:
    assert plan([10], [70], [prompt]).pieces == (Piece(0, 0, 60, 70, 70, is_prompt=False),)
