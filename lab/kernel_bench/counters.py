"""Launches each prefill kernel twice, for a profiler to read hardware counters of.

    ncu --clock-control none --section SpeedOfLight --section ComputeWorkloadAnalysis \
        --kernel-name "regex:_prefill_kernel|_sparse_kernel|_sums_kernel" --launch-skip 4 \
        python -m longreach.lab.kernel_bench.counters --budgets FILE
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from ...kernels import dual_chunk, sparse
from .cases import last_sums, made_up, read_budgets
from .setup import QWEN_7B, STRIDE, Layer

_TOKENS = 2**19
_LAYER = 12


def main() -> None:
    """Dense attention, sparse attention over clustered bands, and both passes of sums."""
    parser = argparse.ArgumentParser(prog="python -m longreach.lab.kernel_bench.counters")
    parser.add_argument("--budgets", type=Path, required=True, help="of the 7B, as published")
    budgets = read_budgets(parser.parse_args().budgets)[_LAYER]
    layer = Layer.random(QWEN_7B, _TOKENS, torch.device("cuda"))
    selections = made_up(layer, budgets, "clustered", np.random.default_rng(0))
    arguments = (layer.queries, layer.blocks, layer.pages, STRIDE, layer.scale)
    for _ in range(2):
        dual_chunk.attention(*arguments)
        sparse.attention(*arguments, selections)
        last_sums(layer)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
