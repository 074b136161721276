"""The command. See the package's docstring and docs/chaos.md."""

import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..commit import commit
from . import report
from .scenarios import Scenario, all_scenarios, choose
from .suite import CannotRunError, Plan, check, run

_console = Console()


def main(
    config: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="The YAML file of the cluster.")
    ] = Path("configs/laptop.yaml"),
    pid: Annotated[
        int | None,
        typer.Option(help="Of a `longreach serve` that runs with it; else one is started."),
    ] = None,
    scenarios: Annotated[
        str, typer.Option(help="Names or patterns, with commas: 'storm-200,kill-*-idle'.")
    ] = "*",
    sizes: Annotated[
        str, typer.Option(help="Tokens of honest prompts, the shortest first, with commas.")
    ] = "1000,4000,12000,33000",
    timeout: Annotated[
        float, typer.Option(help="Seconds after which a request is given up.")
    ] = 120,
    csv: Annotated[Path, typer.Option(help="Where rows go, in place of older ones.")] = Path(
        "docs/bench/chaos.csv"
    ),
    seed: Annotated[int, typer.Option(help="The same seed makes the same prompts.")] = 1,
    list_: Annotated[bool, typer.Option("--list", help="Only say what there is.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Only draw what stands in --csv, as .png or .svg.")
    ] = None,
) -> None:
    """Break a cluster in one way at a time, and count what its clients notice.

    Says what it will do before it does it. Kills processes: name a cluster that nobody needs.

        python -m longreach.loadtest.chaos --scenarios 'storm-200,kill-rank-*'
    """
    if list_:
        _say(all_scenarios())
        return
    if picture is not None:
        from .picture import draw

        draw(csv, picture)
        return
    try:
        chosen = choose(scenarios.split(","))
        plan = Plan(config, pid, tuple(int(size) for size in sizes.split(",")), timeout, seed)
        check(plan, chosen)
    except KeyError as error:
        raise typer.BadParameter(f"no scenario fits {error}; see --list") from error
    except (CannotRunError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    _say(chosen)
    # Asked to end, do as at Ctrl-C, so that the cluster is ended as well.
    for request_to_end in (signal.SIGTERM, signal.SIGINT):
        signal.signal(request_to_end, signal.default_int_handler)
    rows = []
    for result in run(plan, chosen, commit()):
        rows.append(result.row)
        report.write(csv, [result.row])
        _console.print(f"{result.row.scenario}: {result.measured.said or 'done'}", markup=False)
    _console.print(report.table(rows))


def _say(scenarios: list[Scenario]) -> None:
    for each in scenarios:
        _console.print(f"{each.name:<28} {each.does}", markup=False, soft_wrap=True)
    minutes = sum(each.most_seconds for each in scenarios) / 60
    _console.print(f"{len(scenarios)} scenarios, {minutes:,.0f} minutes at the very most")


if __name__ == "__main__":
    typer.run(main)
