"""vLLM over two processes without Ray, as `python -m longreach.lab.vllm_bench ranks` asks it.

On CPUs they sum by gloo, and on two GPUs by NCCL.
"""

import pytest
import torch

from longreach.lab.vllm_bench import ranks
from longreach.lab.vllm_bench.rank import RankCase
from longreach.lab.vllm_bench.ranks import judge, rounds, run_all

from .asynchronous import schedule_asynchronously

SHORT = ("600", "3000")
SECONDS = 200.0
ASYNCHRONOUS = f"""
import sys, pytest
from {schedule_asynchronously.__module__} import schedule_asynchronously
from longreach.lab.vllm_bench.rank import main
if sys.argv[1] == "0":
    schedule_asynchronously(pytest.MonkeyPatch())
main()
"""


def case_of(count: int) -> RankCase:
    """The questions about two prompts, one that vLLM computes and one that is handed over."""
    *lone, together = rounds()
    few = [
        tuple(each for each in questions if each.name.split("-")[1] in (*SHORT, "own", "handed"))
        for questions in (*lone, together)
    ]
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    return RankCase(count, dtype, on_gpu, tuple(each for each in few if each))


@pytest.mark.live
def test_two_ranks_say_what_one_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next step is launched before the last is heard of, as on GPUs: by two ranks."""
    if 0 < torch.cuda.device_count() < 2:
        pytest.skip("two ranks need two GPUs")
    one = case_of(1)
    [alone] = run_all([one], SECONDS)
    monkeypatch.setattr(ranks, "_RANK", ASYNCHRONOUS)
    two = case_of(2)
    [spanning] = run_all([two], SECONDS)
    for case, run in ((one, alone), (two, spanning)):
        verdict = judge(case, run, alone)
        assert verdict.wrong == ()
        assert verdict.tokens > 100
