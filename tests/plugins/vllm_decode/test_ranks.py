"""vLLM over two processes without Ray, as `python -m longreach.lab.vllm_bench ranks` asks it.

On CPUs they sum by gloo, and on two GPUs by NCCL.
"""

import pytest
import torch

from longreach.lab.vllm_bench.rank import RankCase
from longreach.lab.vllm_bench.ranks import judge, rounds, run_all

SHORT = ("600", "3000")


def case_of(ranks: int) -> RankCase:
    """The questions about two prompts, one that vLLM computes and one that is handed over."""
    *lone, together = rounds()
    few = [
        tuple(each for each in questions if each.name.split("-")[1] in (*SHORT, "own", "handed"))
        for questions in (*lone, together)
    ]
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    return RankCase(ranks, dtype, on_gpu, tuple(each for each in few if each))


@pytest.mark.live
def test_two_ranks_say_what_one_says() -> None:
    if 0 < torch.cuda.device_count() < 2:
        pytest.skip("two ranks need two GPUs")
    cases = [case_of(1), case_of(2)]
    one, two = run_all(cases, 200)
    for case, run in zip(cases, (one, two), strict=True):
        verdict = judge(case, run, one)
        assert verdict.wrong == ()
        assert verdict.tokens > 100
