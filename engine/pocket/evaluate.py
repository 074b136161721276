"""Asks a checkpoint for hidden facts: python -m longreach.engine.pocket.evaluate FOLDER

Prints a line of JSON for each task and length: how many of the prompts were answered right.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..decode import Decoder
from ..detokenizer import TokenBytes
from ..local import DirectSender, LocalPrefill
from ..messages import Delta, GenerationRequest, SamplingParameters, Tokens
from ..pages import PagePool, pages_for
from ..tokenizer import Tokenizer
from . import CHECKPOINT
from .corpus import Prompt, one_of_facts_prompt, pass_key_prompt

TASKS: dict[str, Callable[[int, int], Prompt]] = {
    "pass key": pass_key_prompt,
    "1 of 12 facts": one_of_facts_prompt,
}
_MOST_ANSWER_TOKENS = 48
_REQUEST = "evaluation"


@dataclass(frozen=True)
class Cell:
    """What came out for one task at one length. `wrong` are [expected, answered]."""

    task: str
    tokens: int
    prompts: int
    right: int
    seconds: float
    wrong: list[tuple[str, str]]


class Answerer:
    """Greedy answers of a checkpoint, in one process.

    Args:
        max_tokens: of a prompt and its answer.
        sparse: whether prefill follows the checkpoint's budgets, above their threshold.
    """

    def __init__(
        self, folder: Path, max_tokens: int, dtype: torch.dtype, device: torch.device, sparse: bool
    ) -> None:
        room = max_tokens + _MOST_ANSWER_TOKENS
        self.tokenizer = Tokenizer(folder)
        self._prefill = LocalPrefill(folder, room, dtype, device, sparse)
        model = self._prefill.model
        pool = PagePool(model.page_geometry, pages_for(room), device)
        self._decoder = Decoder(model, pool, TokenBytes(self.tokenizer.raw), max_batch=1)

    def encode(self, content: str) -> Tokens:
        """The prompt of a chat in which a user says `content`."""
        return self.tokenizer.encode_chat([{"role": "user", "content": content}])

    def answer(self, prompt: Tokens, chunk_tokens: int = 32768) -> str:
        """The model's answer to a prompt."""
        sampling = SamplingParameters(max_tokens=_MOST_ANSWER_TOKENS, temperature=0.0)
        self._decoder.reserve(GenerationRequest(_REQUEST, prompt, sampling, time.time()))
        sender = DirectSender(self._decoder, _REQUEST)
        prefiller = self._prefill.prefiller
        prefiller.admit(_REQUEST, prompt)
        try:
            logits = None
            for start in range(0, len(prompt), chunk_tokens):
                end = min(start + chunk_tokens, len(prompt))
                logits = prefiller.run_chunk(_REQUEST, start, end, sender).logits
        finally:
            prefiller.release(_REQUEST)
        assert logits is not None
        outputs = self._decoder.start(_REQUEST, logits.cpu().numpy())
        while self._decoder.has_work:
            outputs += self._decoder.step()
        return "".join(delta.text for _, delta in outputs if isinstance(delta, Delta))


def evaluate(answerer: Answerer, task: str, tokens: int, seeds: Sequence[int]) -> Cell:
    """Ask a question a seed, each about a document that makes a prompt of `tokens` tokens."""
    overhead = len(answerer.encode(""))
    started = time.perf_counter()
    wrong: list[tuple[str, str]] = []
    for seed in seeds:
        prompt = TASKS[task](tokens - overhead, seed)
        answered = answerer.answer(answerer.encode(prompt.content))
        if answered != prompt.expected:
            wrong.append((prompt.expected, answered))
    seconds = time.perf_counter() - started
    return Cell(task, tokens, len(seeds), len(seeds) - len(wrong), round(seconds, 1), wrong)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Ask a checkpoint for hidden facts.")
    parser.add_argument("folder", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--dense", action="store_true", help="ignore sparse budgets")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    chosen = parser.parse_args(arguments)
    answerer = Answerer(
        chosen.folder,
        max(chosen.tokens),
        getattr(torch, chosen.dtype),
        torch.device(chosen.device),
        not chosen.dense,
    )
    seeds = range(chosen.first_seed, chosen.first_seed + chosen.prompts)
    for tokens in chosen.tokens:
        for task in chosen.tasks:
            cell = evaluate(answerer, task, tokens, seeds)
            print(json.dumps(asdict(cell), ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
