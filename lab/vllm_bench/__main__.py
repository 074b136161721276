"""The command line of vLLM's benchmark."""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...engine.messages import Tokens
from ...engine.model.config import ModelConfig
from ...engine.model.pocket import CHECKPOINT
from ...engine.model.shapes import known_shapes
from ...engine.text.tokenizer import Tokenizer
from ..csv_lines import append
from ..evaluation.tasks import NEEDLES
from ..lengths import parse_length
from .engine import ENGINES, Engine, gpu_name, versions
from .ranks import compare

_ROOM = 256


@dataclass(frozen=True)
class Line:
    """A row of docs/bench/vllm.csv. `right` of `asked` needles, or seconds and milliseconds.

    Of a crowd, `tpot_ms` is all of the time, waiting for prompts included, over the tokens of
    each that is answered at once.
    """

    engine: str
    what: str
    model: str
    tokens: int
    ttft: float | None
    tpot_ms: float | None
    right: int | None
    asked: int | None
    chunk_tokens: int
    gpus: int
    gpu: str
    versions: str
    commit: str


def main() -> None:
    """Measure, print, and add to a CSV file as soon as a figure is known."""
    parser = argparse.ArgumentParser(prog="python -m longreach.lab.vllm_bench")
    commands = parser.add_subparsers(dest="what", required=True)
    speed, needles = commands.add_parser("speed"), commands.add_parser("needles")
    crowd = commands.add_parser("crowd")
    for command in (speed, crowd):
        command.add_argument("--engine", choices=ENGINES, required=True)
        command.add_argument("--shape", choices=sorted(known_shapes()), default="qwen2.5-7b-1m")
    crowd.add_argument("--at-once", type=int, default=48)
    crowd.add_argument("--rounds", type=int, default=4, help="of so many prompts")
    crowd.add_argument("--generate", type=int, default=257)
    crowd.add_argument("--logprobs", action="store_true", help="of each token, as clients ask")
    speed.add_argument("--generate", type=int, default=65, help="tokens of each answer")
    speed.add_argument("--runs", type=int, default=5, help="of prompts up to 16K; 1 of longer ones")
    needles.add_argument("--prompts", type=int, default=20)
    needles.add_argument("--dtype", default="auto")
    lengths_of = ((speed, "1K,8K,128K"), (needles, "2K,32K,128K"), (crowd, "1K"))
    for command, lengths in lengths_of:
        command.add_argument("--tokens", "--lengths", type=_lengths, default=lengths)
        command.add_argument("--chunk-tokens", type=int, default=32768)
        command.add_argument("--gpus", type=int, default=1, help="that divide the model's heads")
        command.add_argument("--memory", type=float, default=0.92, help="share of the GPU's memory")
        command.add_argument("--csv", type=Path, help="where lines are added")
        command.add_argument("--commit", default="")
    ranks = commands.add_parser("ranks", help="vLLM as decode engine over several ranks")
    ranks.add_argument("--ranks", type=_numbers, default="1,2", help="the first is compared with")
    ranks.add_argument("--seconds", type=float, default=300.0, help="that each may take")
    ranks.add_argument("--eager", action="store_true", help="no graphs: starts sooner")
    given = parser.parse_args()
    if given.what == "ranks":
        sys.exit(0 if compare(given.ranks, given.seconds, given.eager) else 1)
    measure = {"speed": _measure_speed, "needles": _find_needles, "crowd": _answer_many}
    measure[given.what](given)


def _measure_speed(given: argparse.Namespace) -> None:
    folder, longest = known_shapes()[given.shape], max(given.tokens) + given.generate + _ROOM
    engine = Engine(
        given.engine, folder, longest, given.chunk_tokens, gpu_memory_utilization=given.memory,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8]}, max_num_seqs=8,
        tensor_parallel_size=given.gpus,
    )  # fmt: skip
    for tokens in given.tokens:
        runs = given.runs if tokens <= 2**14 else 1
        # What is compiled at the first launch is no part of the figures.
        engine.answer(_random(tokens, 0), 2 if tokens <= 2**17 else 1)
        found = [engine.answer(_random(tokens, seed), given.generate) for seed in range(runs)]
        ttft = statistics.median(each.ttft for each in found)
        tpots = [each.tpot_ms for each in found if each.tpot_ms is not None]
        _add(given, given.shape, tokens, ttft=ttft, tpot_ms=statistics.median(tpots))


def _answer_many(given: argparse.Namespace) -> None:
    """Answers to many prompts, so many at once; the next begins when one has ended."""
    folder, longest = known_shapes()[given.shape], max(given.tokens) + given.generate + _ROOM
    engine = Engine(
        given.engine, folder, longest, given.chunk_tokens, gpu_memory_utilization=given.memory,
        max_num_seqs=given.at_once, tensor_parallel_size=given.gpus,
    )  # fmt: skip
    for tokens in given.tokens:
        count = given.at_once * given.rounds
        prompts = [_random(tokens, seed) for seed in range(count + given.at_once)]
        engine.ask(prompts[count:], 2, (), given.logprobs)
        begun = time.perf_counter()
        engine.ask(prompts[:count], given.generate, (), given.logprobs)
        seconds = time.perf_counter() - begun
        print(f"{tokens} tokens: {count * given.generate / seconds:.0f} tokens/s", flush=True)
        # As if each of those that are answered at once got its tokens at an even pace.
        pace = seconds / given.rounds / given.generate * 1e3
        _add(given, given.shape, tokens, tpot_ms=pace, asked=count)


def _find_needles(given: argparse.Namespace) -> None:
    tokenizer, task = Tokenizer(CHECKPOINT), NEEDLES[0]
    ends = ModelConfig.from_folder(CHECKPOINT).eos_token_ids

    def encode(content: str) -> Tokens:
        return tokenizer.encode_chat([{"role": "user", "content": content}])

    options = {} if gpu_name() == "CPU" else {"gpu_memory_utilization": given.memory}
    engine = Engine(
        "vllm+plugin", CHECKPOINT, max(given.tokens) + _ROOM, given.chunk_tokens,
        dtype=given.dtype, max_num_seqs=4, tensor_parallel_size=given.gpus, **options,
    )  # fmt: skip
    for tokens in given.tokens:
        begun, right = time.perf_counter(), 0
        for seed in range(given.prompts):
            prompt = task.prompt(tokens, seed, None, lambda content: len(encode(content)))
            [answered] = engine.ask([encode(prompt.content)], task.answer_tokens, ends)
            right += task.score(tokenizer.decode(answered.tokens), prompt.expected) == 1
        print(f"{tokens} tokens: {time.perf_counter() - begun:.1f} s", flush=True)
        _add(given, "pocket", tokens, right=right, asked=given.prompts)


def _add(
    given: argparse.Namespace,
    model: str,
    tokens: int,
    ttft: float | None = None,
    tpot_ms: float | None = None,
    right: int | None = None,
    asked: int | None = None,
) -> None:
    engine = getattr(given, "engine", "vllm+plugin")
    line = Line(
        engine, given.what, model, tokens, _rounded(ttft), _rounded(tpot_ms), right, asked,
        given.chunk_tokens, given.gpus, gpu_name(), versions(), given.commit,
    )  # fmt: skip
    print("LINE", *asdict(line).values(), sep=" | ", flush=True)
    if given.csv is not None:
        append(given.csv, [line])


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _random(count: int, seed: int) -> Tokens:
    # No special token of any served model is that low.
    return np.random.default_rng(seed).integers(100, 100_000, count).astype(np.int32)


def _lengths(text: str) -> Sequence[int]:
    return [parse_length(each) for each in text.split(",")]


def _numbers(text: str) -> Sequence[int]:
    return [int(each) for each in text.split(",")]


if __name__ == "__main__":
    main()
