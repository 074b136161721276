"""The first rows of the evidence, in short: what the pocket model finds up to 36K tokens."""

from collections.abc import Callable

import pytest
import torch

from longreach.cluster.remedies import remedied
from longreach.engine.errors import ConfigurationError, OutOfMemoryError
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.prefill import prefiller
from longreach.lab.evaluation.in_process import InProcessAnswerer, Variant
from longreach.lab.evaluation.tasks import NEEDLES
from longreach.lab.pocket.corpus import REFUSAL, one_of_facts_prompt

from ...engine.checkpoints import make_checkpoint

TASKS = {task.name: task for task in NEEDLES}
Right = Callable[..., int]
FEW_AND_MORE = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def right() -> Right:
    """How many of the first prompts of a task are answered right."""
    answerer = InProcessAnswerer(CHECKPOINT, list(Variant), 36 * 1024 + 512, torch.float32)

    def count(
        name: str,
        tokens: int,
        prompts: int = 1,
        variant: str = "dense",
        depth: float | None = None,
    ) -> int:
        task, right = TASKS[name], 0
        for seed in range(prompts):
            prompt = task.prompt(tokens, seed, depth, answerer.counter(""))
            answer = answerer.answer(variant, prompt.content, 48, lambda _: None)
            assert answer.prompt_tokens == tokens
            right += task.score(answer.text, prompt.expected) == 1
        return right

    return count


@pytest.mark.parametrize(
    ("name", "tokens", "prompts"),
    [
        ("pass-key", 2048, 3),
        ("pass-key", 8192, 1),
        pytest.param("pass-key", 32768, 1, marks=pytest.mark.slow),
        ("key-value", 2048, 3),
        ("key-value", 8192, 1),
        ("one-of-12-facts", 2048, 3),
        ("one-of-12-facts", 8192, 2),
        pytest.param("one-of-12-facts", 8192, 8, marks=pytest.mark.slow),
        pytest.param("one-of-12-facts", 32768, 1, marks=pytest.mark.slow),
    ],
)
def test_facts_are_found_under_dual_chunk_attention(right, name, tokens, prompts) -> None:
    assert right(name, tokens, prompts) == prompts


@pytest.mark.parametrize("prompts", FEW_AND_MORE)
def test_what_stands_right_before_the_question_is_found(right: Right, prompts: int) -> None:
    assert right("key-value", 8192, prompts, depth=1.0) == prompts


@pytest.mark.parametrize("prompts", FEW_AND_MORE)
def test_what_is_not_there_is_said_not_to_be(prompts: int) -> None:
    answerer = InProcessAnswerer(CHECKPOINT, [Variant.DENSE], 4096, torch.float32)
    for seed in range(prompts):
        content = one_of_facts_prompt(3000, seed).content
        absent = "price of the hidden walrus"
        assert absent not in content
        document = content[: content.rindex("\n")]
        question = f"{document}\nWhat is the {absent}?"
        assert answerer.answer("dense", question, 48, lambda _: None).text == REFUSAL


def test_facts_are_found_under_sparse_prefill(right: Right) -> None:
    assert right("pass-key", 36 * 1024, variant="sparse") == 1


@pytest.mark.slow
def test_plain_positions_lose_them_beyond_the_trained_length(right: Right) -> None:
    assert right("pass-key", 2048, 2, "plain", depth=0) == 2
    assert right("pass-key", 8192, 2, "plain", depth=0) == 0


def test_variants_that_a_checkpoint_lacks_are_refused(tmp_path) -> None:
    plain = make_checkpoint(tmp_path)
    (plain / "tokenizer.json").write_bytes((CHECKPOINT / "tokenizer.json").read_bytes())
    for variant, words in ((Variant.PLAIN, "no dual chunks"), (Variant.SPARSE, "calibrate")):
        with pytest.raises(ConfigurationError, match=words):
            InProcessAnswerer(plain, [variant], 1024)


def test_too_little_memory_names_an_option_and_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """`longreach eval` is a command of the cluster's command line, which knows settings alone."""

    def without_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError("as the allocator says it")

    answerer = InProcessAnswerer(CHECKPOINT, [Variant.DENSE], 1024, torch.float32)
    monkeypatch.setattr(prefiller, "run_chunk", without_memory)
    with pytest.raises(OutOfMemoryError) as raised:
        answerer.answer("dense", "a question", 4, lambda _: None)
    said = str(remedied(raised.value))
    assert "--lengths" in said
    assert "prefill." not in said
