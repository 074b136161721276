"""How many values are recalled from documents of training's kind, by sparse budgets.

    python -m longreach.lab.pocket.recalled dense FOLDER --lengths 129024 516096

Each document is prefilled once under the budgets of each folder named, or densely, and then asked
for its values: one prompt each, whose last rows attend to everything, as a user's would. All are
asked the same, so that they can be compared value by value.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ...engine.kv.pages import PagePool
from ...engine.messages import Tokens
from ...engine.model.pocket import CHECKPOINT
from ...engine.model.qwen2 import Qwen2
from ...engine.parallel.mesh import Mesh
from ...engine.prefill.prefiller import Prefiller
from ...engine.prefill.sparsity import SparsityConfig
from ...kernels.page_size import PAGE_TOKENS, pages_for
from .corpus import Stage, make_batch
from .tokenizer import TURN_START_ID

_SEED = 1_000_000
_QUESTIONS, _FACTS = 64, 160
_CHUNK_TOKENS = 32768
_ASSISTANT = b"assistant\n"
_DENSE = "dense"


@dataclass(frozen=True)
class Turn:
    """A question and its answer; `answer` is where the answer begins in `tokens`."""

    tokens: Tokens
    answer: int


@dataclass(frozen=True)
class Document:
    """A chat's beginning, up to its first answer, and the turns that may follow it."""

    beginning: Tokens
    turns: tuple[Turn, ...]

    @classmethod
    def made_up(cls, length: int, number: int) -> "Document":
        """One that training never sees, with what is asked about it `length` tokens at most."""
        stage = Stage(length, 1, 1, (0.9, 1.0), questions=_QUESTIONS, most_facts=_FACTS)
        batch = make_batch(stage, _SEED, number)
        tokens, recalled = batch.tokens[0].astype(np.int32), batch.recalled[0]
        (_, _, end), *others = _answers(tokens, recalled)
        turns = (Turn(tokens[start:end], answer - start) for start, answer, end in others)
        return cls(tokens[: end + 1], tuple(turns))


def _answers(tokens: Tokens, recalled: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int, int]]:
    """Where each question's turn begins, its answer, and what follows that."""
    starts = np.flatnonzero(tokens == TURN_START_ID)
    for question, assistant in itertools.pairwise(starts):
        answer = int(assistant) + 1 + len(_ASSISTANT)
        said = tokens[assistant + 1 : answer].astype(np.uint8).tobytes()
        if said == _ASSISTANT and recalled[answer]:
            length = int(np.argmin(recalled[answer:]))
            yield int(question), answer, answer + length


def recalled_whole(prefiller: Prefiller, pool: PagePool, document: Document) -> list[bool]:
    """Of each turn, whether greedy decoding would give its answer and end it."""
    beginning = document.beginning
    done = len(beginning) // PAGE_TOKENS * PAGE_TOKENS
    most = max((len(turn.tokens) for turn in document.turns), default=1)
    pages = pool.allocate(pages_for(len(beginning) + most))
    try:
        # As long as the prompts that follow, so that none of it is the last rows.
        whole = np.concatenate((beginning, np.zeros(most, np.int32)))
        prefiller.admit("document", whole, pages)
        for start in range(0, done, _CHUNK_TOKENS):
            prefiller.run_chunk("document", start, min(start + _CHUNK_TOKENS, done))
        prefiller.release("document")
        return [_is_recalled(prefiller, beginning, turn, pages, done) for turn in document.turns]
    finally:
        pool.release(pages)


def _is_recalled(
    prefiller: Prefiller, beginning: Tokens, turn: Turn, pages: Sequence[int], done: int
) -> bool:
    prompt = np.concatenate((beginning, turn.tokens))
    prefiller.admit("turn", prompt, pages, done)
    try:
        scores = prefiller.run_chunk("turn", done, len(prompt), score_top=1).scores
        assert scores is not None
        # Row r tells of the token after it, whose rank is in column 1.
        first = len(beginning) + turn.answer - 1 - done
        return bool((scores[first:-1, 1] == 1).all())
    finally:
        prefiller.release("turn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("budgets", nargs="+", help=f"folders with sparse budgets, or {_DENSE}")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32256])
    parser.add_argument("--documents", type=int, default=3, help="of each length")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    model = Qwen2.load(CHECKPOINT, Mesh.single(), torch.bfloat16, device, "auto")
    pool = PagePool(model.page_geometry, pages_for(max(options.lengths)) + 8, device)
    for length in options.lengths:
        documents = [Document.made_up(length, number) for number in range(options.documents)]
        first: list[bool] | None = None
        for budgets in options.budgets:
            sparsity = None if budgets == _DENSE else SparsityConfig.from_folder(Path(budgets))
            prefiller = Prefiller(model, pool, sparsity)
            found = [
                each for document in documents for each in recalled_whole(prefiller, pool, document)
            ]
            first = first or found
            better = sum(now > then for now, then in zip(found, first, strict=True))
            worse = sum(now < then for now, then in zip(found, first, strict=True))
            print(
                f"{length:>9,} tokens, {budgets}: {sum(found)} of {len(found)} values; against "
                f"{options.budgets[0]} {better} better, {worse} worse",
                flush=True,
            )


if __name__ == "__main__":
    main()
