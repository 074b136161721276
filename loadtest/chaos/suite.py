"""Runs scenarios one after the other, each on a cluster that is well."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..prompts import PromptMaker
from .cluster import Cluster, Overrides, attach, launched
from .load import Alone, Workload
from .report import Row
from .scenarios import Measured, Scenario

_LEAK_SECONDS = 10.0


@dataclass(frozen=True)
class Plan:
    """What to load the cluster with.

    Attributes:
        config: the YAML file that it serves, or shall serve.
        pid: of `longreach serve`, where it runs already.
        sizes: tokens of honest prompts, the shortest first.
        timeout: seconds after which an honest request is given up.
    """

    config: Path
    pid: int | None
    sizes: tuple[int, ...]
    timeout: float
    seed: int


class CannotRunError(Exception):
    """A scenario needs a cluster of its own, and the one that is given is somebody else's."""


def check(plan: Plan, scenarios: Sequence[Scenario]) -> None:
    """Raises:
    CannotRunError: see there.
    """
    for each in scenarios:
        if plan.pid is not None and (each.ends_cluster or each.overrides):
            raise CannotRunError(
                f"{each.name} ends the cluster, or needs other settings; leave --pid out, so "
                "that one is started for it"
            )


@dataclass(frozen=True)
class Result:
    """A scenario's row, and all that was measured."""

    row: Row
    measured: Measured


def run(plan: Plan, scenarios: Sequence[Scenario], commit: str) -> Iterator[Result]:
    """Yields a scenario's result as soon as it is over.

    A cluster is started for the first scenario, and again where one has ended, did not recover, or
    has other settings than the next one needs.
    """
    with _Keeper(plan) as keeper:
        for scenario in scenarios:
            cluster, workload = keeper.cluster_for(scenario)
            measured = scenario.run(cluster, workload)
            leaked = None if cluster.has_ended() else cluster.leaked_pages(_LEAK_SECONDS)
            yield Result(_row(scenario, measured, leaked, commit), measured)
            if scenario.ends_cluster or measured.ready_again is None or leaked != 0:
                keeper.end()


def _row(scenario: Scenario, measured: Measured, leaked: int | None, commit: str) -> Row:
    tally = measured.tally
    return Row(
        scenario.name,
        scenario.load,
        tally.requests,
        tally.lost,
        tally.wrong,
        tally.hung,
        leaked,
        measured.served_again,
        measured.ready_again,
        commit,
    )


class _Keeper:
    """Has a cluster that is well for each scenario."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._stack = ExitStack()
        self._overrides: Overrides = {}
        self._alone: dict[str, Alone] = {}
        self._current: tuple[Cluster, Workload] | None = None

    def __enter__(self) -> "_Keeper":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def cluster_for(self, scenario: Scenario) -> tuple[Cluster, Workload]:
        """The one from before, where it will do."""
        if self._current is not None and self._overrides != scenario.overrides:
            self.end()
        if self._current is None:
            self._current = self._start(scenario)
            self._overrides = scenario.overrides
        return self._current

    def end(self) -> None:
        """End the cluster, if it is ours, or let go of it."""
        self._stack.close()
        self._current = None

    def _start(self, scenario: Scenario) -> tuple[Cluster, Workload]:
        plan = self._plan
        if plan.pid is not None:
            cluster = attach(plan.config, plan.pid)
        else:
            cluster = self._stack.enter_context(launched(plan.config, scenario.overrides))
        client = cluster.client
        maker = PromptMaker(client.text_size(), plan.seed)
        settings = repr(scenario.overrides)
        alone = self._alone.setdefault(settings, Alone())
        workload = Workload(client, maker, plan.sizes, plan.timeout, alone)
        workload.warm_up()
        if not alone.seconds:
            workload.measure_alone()
        return cluster, workload
