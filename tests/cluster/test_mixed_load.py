"""The load test of mixed prompts against a real cluster."""

from contextlib import AbstractContextManager, nullcontext

from longreach.cluster.app import LocalCluster
from longreach.loadtest.endpoint import Endpoint
from longreach.loadtest.mixed.live import Board
from longreach.loadtest.mixed.mix import Mix
from longreach.loadtest.mixed.plan import Bounds, ClosedLoad, Plan
from longreach.loadtest.mixed.prepare import Style
from longreach.loadtest.mixed.run import Runner
from longreach.loadtest.mixed.slo import Slo
from longreach.loadtest.mixed.workload import Workload

from .conftest import MODEL


def test_mixed_prompts_are_answered_right_and_as_long_as_planned(cluster: LocalCluster) -> None:
    endpoint = Endpoint(cluster.url)
    slo = Slo.parse("10K=300", per_token=300)
    workload = Workload(
        source=Mix.parse("512=4,4K-5K=2"),
        slo=slo,
        style=Style(check=True, whole=True),
        bounds=Bounds(requests=6, seconds=120, timeout=120),
        answer_tokens=20,
        scale=1.0,
        seed=1,
    ).cut_to(endpoint.max_model_len())
    runner = Runner(endpoint, workload, endpoint.text_size())
    boards: list[Board] = []

    def watch(plan: Plan) -> AbstractContextManager[Board]:
        boards.append(Board(plan, slo))
        return nullcontext(boards[-1])

    result = runner.run(ClosedLoad(2), watch)
    assert endpoint.model == MODEL
    assert [record.failure for record in result.records] == [None] * 6
    assert (result.summary.whole.right, result.summary.whole.good) == (6, 6)
    for record in result.records:
        assert record.prompt_tokens is not None
        assert abs(record.prompt_tokens - record.ask.tokens) < 0.05 * record.ask.tokens + 30
        assert record.answer_tokens == 20
        assert len(record.gaps) > 5
    assert "6 of 6 ended, 6 good, 0 failed" in boards[0].line()
