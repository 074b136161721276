"""Prompts that load tests send."""

import pytest

from longreach.loadtest.prompts import PromptMaker, TextSize


@pytest.mark.parametrize("tokens", [100, 3_000, 33_000])
def test_a_prompt_has_about_the_tokens_asked_for_and_one_key(tokens: int) -> None:
    prompt = PromptMaker(TextSize(4.0), seed=3).make(tokens)
    assert len(prompt.text) == pytest.approx(4 * tokens, rel=0.1, abs=120)
    assert prompt.text.count(prompt.key) == 2
    assert prompt.is_answered_by(f" {prompt.key}. 4711")
    assert not prompt.is_answered_by(f"4711 {prompt.key}")
    assert not prompt.is_answered_by("")


def test_prompts_differ_and_the_same_seed_makes_the_same() -> None:
    one, same = PromptMaker(TextSize(4.0), seed=3), PromptMaker(TextSize(4.0), seed=3)
    first, second = one.make(500), one.make(500)
    assert first.text != second.text
    assert [same.make(500), same.make(500)] == [first, second]


def test_every_seed_makes_other_prompts() -> None:
    texts = {PromptMaker(TextSize(4.0), seed).make(500).text for seed in (2, 3, (1 << 32) + 2)}
    assert len(texts) == 3


def test_a_template_and_an_opening_take_their_part_of_the_tokens() -> None:
    plain = PromptMaker(TextSize(4.0), seed=3).make(1_000)
    within_a_template = PromptMaker(TextSize(4.0, 200.0), seed=3).make(1_000)
    assert len(plain.text) - len(within_a_template.text) == pytest.approx(800, abs=120)
    opened = PromptMaker(TextSize(4.0), seed=3).make(1_000, opening="x" * 2_000)
    assert opened.text.startswith("x" * 2_000)
    assert opened.text.index(opened.key) > 2_000
    assert len(opened.text) == pytest.approx(4_000, abs=120)
