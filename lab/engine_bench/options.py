"""The command line, checked."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from ...engine.errors import ConfigurationError
from ...engine.model.config import WeightFormat
from ...engine.model.files import POCKET, RANDOM, ModelFiles
from ...kernels.page_size import PAGE_TOKENS
from .running import Chosen
from .subject import KV_CACHE_TYPES

ATTENTIONS = ("sparse", "dense")
_SUFFIXES = {"K": 2**10, "M": 2**20}
_MESHES = {
    "prompts": "1x1",
    "scaling": "1x1,1x2,1x4,1x8,2x4",
    "mesh": "1x1,1x2,2x1",
    "span": "1x1,2x1",
}
_CSV = {
    "prompts": Path("docs/bench/engine.csv"),
    "scaling": Path("docs/bench/scaling.csv"),
    "mesh": Path("docs/bench/mesh.csv"),
    "span": Path("docs/bench/span.csv"),
}
_BATCHES = "1x2K,1x128K,1x1000000,8x128K,1x1000000+30x1K"


@dataclass(frozen=True)
class Options:
    """What to measure; `tokens` rise.

    `chunks` are sizes of chunks, one but for a mesh; `rank_tokens` those that each sequence rank of
    a mesh computes at once, in a chunk more.
    """

    what: str
    name: str
    files: ModelFiles
    tokens: tuple[int, ...]
    attentions: tuple[str, ...]
    kv_cache: str
    kept: WeightFormat
    chunks: tuple[int, ...]
    rank_tokens: int | None
    dense_up_to: int | None
    decode: int
    batches: tuple[tuple[int, ...], ...]
    chosen: tuple[Chosen, ...]
    baseline: bool
    csv: Path
    commit: str | None
    seed: int
    meshes: tuple[tuple[int, int], ...]
    link_gbs: float
    latency_us: float

    @property
    def chunk_tokens(self) -> int:
        """Of every chunk but a prompt's last."""
        return self.chunks[0]

    @property
    def weights(self) -> str:
        """Where they come from, and how they are kept."""
        source = f"random, seed {self.seed}" if self.files.random else "checkpoint"
        return source if self.kept == "auto" else f"{source}, {self.kept}"


def _chosen(sampled: bool, held: bool) -> tuple[Chosen, ...]:
    more: tuple[Chosen, ...] = ("sampled", "held") if held else ("sampled",) if sampled else ()
    return ("greedy", *more)


def _files(name: str, tokenizer: str | None) -> ModelFiles:
    files = ModelFiles.of(name)
    return files if tokenizer is None else replace(files, tokenizer_folder=Path(tokenizer))


def parse(arguments: list[str] | None = None) -> Options:
    """Read and check a command line.

    Raises:
        CheckpointError: no such shape.
        ConfigurationError: a value that is none of its option's.
    """
    parser = argparse.ArgumentParser(
        prog="python -m longreach.lab.engine_bench",
        description="Prefill and decode at a model's real size on this machine's device; "
        "`mesh` runs meshes of several GPUs, `span` decodes on several, and `scaling` predicts "
        "meshes from one rank's work.",
    )
    parser.add_argument("what", nargs="?", choices=list(_CSV), default="prompts")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shape", default="qwen2.5-7b-1m", help="random weights of this shape")
    which.add_argument("--checkpoint", help=f"a checkpoint folder, or {POCKET}")
    parser.add_argument(
        "--tokens", default="1000000", help='lengths, such as 32K,1000000; "" for none'
    )
    parser.add_argument("--attention", default="sparse", help="sparse, dense, or sparse,dense")
    parser.add_argument("--dense-up-to", type=count, help="leave longer dense prompts out")
    parser.add_argument("--kv-cache", choices=list(KV_CACHE_TYPES), default="bf16")
    parser.add_argument("--weights", choices=get_args(WeightFormat), default="auto")
    parser.add_argument("--chunk-tokens", default="32K", help="mesh: several, as 32K,64K")
    parser.add_argument(
        "--rank-tokens", help="mesh: besides, chunks of so many for each sequence rank"
    )
    parser.add_argument("--decode", type=int, default=64, help="tokens after the first")
    parser.add_argument("--batches", default=_BATCHES, help='decode only; "" for none')
    parser.add_argument("--sampled", action="store_true", help="batches with top-p 0.8 as well")
    parser.add_argument(
        "--held", action="store_true", help="and batches that are held to a grammar besides"
    )
    parser.add_argument(
        "--tokenizer", help="of a shape: a folder with the model's own, for what grammars cost"
    )
    parser.add_argument("--baseline", action="store_true", help="time cuDNN's attention as well")
    parser.add_argument("--csv", type=Path, help="to add to; else one in docs/bench")
    parser.add_argument("--commit", help="what to call the code, where there is no git")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--meshes", help="mesh, scaling: tensor x sequence parallel, as 1x1,2x4")
    parser.add_argument("--link-gbs", type=float, default=450.0, help="scaling: GB/s each way")
    parser.add_argument("--latency-us", type=float, default=20.0, help="scaling: of a collective")
    given = parser.parse_args(arguments)
    name = given.checkpoint or RANDOM + given.shape
    attentions = tuple(given.attention.split(","))
    if not set(attentions) <= set(ATTENTIONS):
        raise ConfigurationError(f"--attention {given.attention}: name {' or '.join(ATTENTIONS)}")
    chunks = tuple(dict.fromkeys(count(each) for each in given.chunk_tokens.split(",")))
    rank_tokens = None if given.rank_tokens is None else count(given.rank_tokens)
    for option, tokens in (
        *(("--chunk-tokens", each) for each in chunks), ("--rank-tokens", rank_tokens or 0),
    ):  # fmt: skip
        if tokens % PAGE_TOKENS:
            raise ConfigurationError(f"{option} is {tokens}; make it a multiple of {PAGE_TOKENS}")
    if given.what != "mesh" and (len(chunks) > 1 or rank_tokens is not None):
        raise ConfigurationError(
            "several sizes of chunks, and --rank-tokens, are for `mesh`; name one --chunk-tokens"
        )
    if given.decode < 0:
        raise ConfigurationError(f"--decode {given.decode}: take 0 or more")
    if given.what != "prompts" and not given.tokens:
        raise ConfigurationError(f"{given.what} needs a prompt; name its length with --tokens")
    if given.what == "scaling" and given.kv_cache != "bf16":
        raise ConfigurationError("scaling is of bf16 pages; leave --kv-cache out")
    if given.what == "scaling" and given.weights != "auto":
        raise ConfigurationError("scaling is of weights as they come; leave --weights out")
    if not given.link_gbs > 0:
        raise ConfigurationError(f"--link-gbs {given.link_gbs}: take more than 0")
    if not given.latency_us >= 0:
        raise ConfigurationError(f"--latency-us {given.latency_us}: take 0 or more")
    return Options(
        what=given.what,
        name=name.removeprefix(RANDOM),
        files=_files(name, given.tokenizer),
        tokens=tuple(sorted({count(each) for each in given.tokens.split(",") if each})),
        attentions=attentions,
        kv_cache=given.kv_cache,
        kept=given.weights,
        chunks=chunks,
        rank_tokens=rank_tokens,
        dense_up_to=given.dense_up_to,
        decode=given.decode,
        batches=tuple(batch(each) for each in given.batches.split(",") if each),
        chosen=_chosen(given.sampled, given.held),
        baseline=given.baseline,
        csv=given.csv or _CSV[given.what],
        commit=given.commit,
        seed=given.seed,
        meshes=tuple(mesh(each) for each in (given.meshes or _MESHES[given.what]).split(",")),
        link_gbs=given.link_gbs,
        latency_us=given.latency_us,
    )


def count(text: str) -> int:
    """Tokens from "1000000", "32K" (of 1,024) or "1M" (of 1,048,576).

    Raises:
        ConfigurationError: it is no such number, or 0.
    """
    digits = text.strip().upper()
    factor = _SUFFIXES.get(digits[-1:], 1)
    digits = digits[:-1] if factor > 1 else digits
    if not digits.isdecimal() or int(digits) == 0:
        raise ConfigurationError(f"{text!r} is no number of tokens; write 1000000, 32K or 1M")
    return int(digits) * factor


def batch(text: str) -> tuple[int, ...]:
    """Lengths from "8x128K" or "1x1M+30x1K".

    Raises:
        ConfigurationError: it is no such batch.
    """
    lengths: list[int] = []
    for group in text.split("+"):
        number, found, length = group.partition("x")
        if not found or not number.strip().isdecimal() or not int(number):
            raise ConfigurationError(f"{text!r} is no batch; write 8x128K or 1x1M+30x1K")
        lengths += [count(length)] * int(number)
    return tuple(lengths)


def mesh(text: str) -> tuple[int, int]:
    """Tensor parallel and sequence parallel ranks from "2x4".

    Raises:
        ConfigurationError: it is no such mesh.
    """
    tensor, _, sequence = text.strip().partition("x")
    if not (tensor.isdecimal() and sequence.isdecimal() and int(tensor) and int(sequence)):
        raise ConfigurationError(f"{text!r} is no mesh; write 1x8 or 2x4")
    return int(tensor), int(sequence)
