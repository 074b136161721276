"""What others take: cuDNN's dense attention in the same run, and vLLM's figures, as read."""

from collections.abc import Mapping

import numpy as np
import torch

from ...engine.model.config import ModelConfig
from ..kernel_bench.measure import Timing
from ..kernel_bench.setup import CHUNK_TOKENS, Layer, Shape, sdpa_baseline

VLLM_SOURCE = (
    "vLLM 0.26, one H200, Qwen2.5-7B's shape with random weights, FlashAttention 3, plain RoPE, "
    "dense, chunk 32768, one run each"
)
VLLM_TTFT_SECONDS: Mapping[int, float] = {
    2**15: 1.02, 2**17: 8.23, 2**18: 27.6, 2**19: 98.5, 1_000_000: 340.0,
}  # fmt: skip
VLLM_TPOT_MS: Mapping[int, float] = {
    2**11: 4.92, 2**15: 5.38, 2**17: 6.68, 1_000_000: 18.0,
}  # fmt: skip
VLLM_MODEL = "qwen2.5-7b-1m"

_LENGTHS = (2**16, 2**17, 2**18, 2**19, 2**20)


class DenseBaseline:
    """cuDNN's causal attention of one layer, timed at some lengths: a prompt's by integration."""

    def __init__(self, config: ModelConfig, longest: int, device: torch.device) -> None:
        self._config = config
        shape = Shape("baseline", config.num_heads, config.num_kv_heads, config.head_dim)
        # One length more than the longest prompt, so that its end lies between two of them.
        short = [length for length in _LENGTHS if length < longest]
        self._lengths = list(_LENGTHS[: len(short) + 1])
        self._rates = [_rate(shape, length, device) for length in self._lengths]

    def attention_seconds(self, tokens: int) -> float:
        """Of all chunks and all layers but the last, whose rows no one wants."""
        config, seconds = self._config, 0.0
        for start in range(0, tokens, CHUNK_TOKENS):
            end = min(start + CHUNK_TOKENS, tokens)
            pairs = (end * (end + 1) - start * (start + 1)) / 2
            flops = 4 * config.head_dim * config.num_heads * pairs
            seconds += flops / float(np.interp(end, self._lengths, self._rates))
        return seconds * (config.num_layers - 1)


def _rate(shape: Shape, length: int, device: torch.device) -> float:
    """FLOP/s of the last 32K rows of a prompt."""
    layer = Layer.random(shape, length, device)
    seconds = Timing.of(sdpa_baseline(layer), 3, 1).p50 / 1e3
    return layer.flops / seconds
