"""The clusters in `configs/`: each is accepted, and those for a published model fit their GPUs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from longreach.cluster.memory import decode_fit, prefill_fit
from longreach.cluster.settings import Settings, check_model, parse_settings, warnings_about
from longreach.engine.memory.fit import Fit

CONFIGS = Path(__file__).parents[3] / "configs"
GPUS = {
    "one-gpu-qwen2.5-7b": 149e9,
    "one-gpu-qwen2.5-7b-80gb": 84e9,
    "four-gpus-qwen2.5-7b": 84e9,
    "two-gpus-qwen2.5-14b": 149e9,
    "three-gpus-qwen2.5-14b": 149e9,
    "four-gpus-qwen2.5-14b": 149e9,
    "eight-gpus-qwen2.5-7b": 84e9,
    "eight-gpus-qwen2.5-14b": 149e9,
    "one-gpu-vllm": 84e9,
    "four-gpus-vllm": 84e9,
}
"""Bytes that are free on each GPU: of an H200 and of an H100, with some left for the driver."""


def read(name: str) -> Settings:
    """A cluster, with random weights in place of a checkpoint that nobody has downloaded here."""
    raw: Any = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    if raw["model"]["path"].startswith("models/"):
        raw["model"]["path"] = f"random/{raw['model']['name']}"
    return parse_settings(raw)


def needed(fit: Fit, tokens: int, longest: int | None = None) -> int:
    """Bytes of weights, pages and computing."""
    needs = fit.needs(tokens, longest)
    return needs.weight_bytes + needs.cache_bytes + needs.computing_bytes


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_it_is_accepted_without_a_warning(name: str) -> None:
    settings = read(name)
    check_model(settings)
    assert warnings_about(settings) == []


@pytest.mark.parametrize(("name", "gpu"), GPUS.items())
def test_it_fits_the_gpus_that_it_is_for(name: str, gpu: float) -> None:
    settings = read(name)
    [gang], decode = settings.gangs, settings.decode
    prefill = gang.prefill
    rank = needed(prefill_fit(gang, int(gpu), 1), prefill.kv_cache_tokens, gang.max_prompt_tokens)
    worker = needed(decode_fit(settings.worker, int(gpu)), decode.kv_cache_tokens)
    together = prefill.gpus_per_rank + decode.gpus <= 1
    assert max(rank + worker if together else rank, worker) <= gpu
