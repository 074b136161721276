"""The command. See the package's docstring and docs/load.md."""

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import httpx
import typer
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from rich.console import Console

from ..endpoint import Endpoint
from . import mix as mixes
from . import slo as slos
from .arrivals import Pattern
from .live import watching
from .options import Options, Scale
from .plan import ClosedLoad, Plan, TraceLoad
from .results import Results
from .run import NotAnsweredError, Runner
from .sweep import Step, highest
from .table import errors, figure, plan_table, steps_table, summary_table
from .workload import Workload

_console = Console()
_LATE_SECONDS = 0.05
_ENDED_BADLY = 1


def main(
    context: typer.Context,
    base_url: Annotated[
        str, typer.Option(help="Of any endpoint that speaks OpenAI's protocol.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Its name; else the first one served.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file with an API key.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop: requests a second, in the mean.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Closed loop: so many clients, one request each at a time.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Open loop: a JSONL file as Mooncake's."),
    ] = None,
    speed: Annotated[float, typer.Option(help="How many times as fast as the trace.")] = 1.0,
    arrivals: Annotated[Pattern, typer.Option(help="How --rate is spread.")] = Pattern.POISSON,
    burst: Annotated[int, typer.Option(help="How many come at once, with bursts.")] = 8,
    mix: Annotated[
        str, typer.Option(help="Prompt tokens and weights; 1K is 1,024.")
    ] = mixes.DEFAULT,
    scale: Annotated[Scale, typer.Option(help="laptop: an eighth of every length.")] = Scale.FULL,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    requests: Annotated[int, typer.Option(help="At most so many; a sweep's: for each load.")] = 100,
    seconds: Annotated[float, typer.Option(help="None is sent later than this.")] = 120.0,
    timeout: Annotated[float, typer.Option(help="Seconds until a request is given up.")] = 300.0,
    slo: Annotated[
        str, typer.Option(help="Seconds to the first token, for prompts up to so many tokens.")
    ] = slos.DEFAULT_WAITS,
    slo_per_token: Annotated[
        float, typer.Option(help="Seconds for each further token, in an answer's mean.")
    ] = slos.DEFAULT_PER_TOKEN,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Find the highest load that holds the SLO.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Loads that a sweep tries, at most.")] = 8,
    hold: Annotated[
        float, typer.Option(help="Share of good answers in every class that holds the SLO.")
    ] = 0.95,
    check: Annotated[
        bool, typer.Option(help="Whether the model can find a pass key; random weights cannot.")
    ] = True,
    ignore_eos: Annotated[
        bool, typer.Option(help="Have all tokens of an answer; some endpoints refuse the field.")
    ] = True,
    seed: Annotated[
        int, typer.Option(help="The same makes the same prompts, at the same times.")
    ] = 1,
    warm_up: Annotated[int, typer.Option(help="Short prompts before, which do not count.")] = 3,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder; else results/load/ and the time.")
    ] = None,
    note: Annotated[
        str, typer.Option(help="On what and beside what it is measured; kept with the figures.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is sent.")] = False,
) -> None:
    """Send prompts of mixed lengths to an endpoint, and say how long each class waits.

    Says what it sends before it does, and ends by itself; Ctrl-C ends it sooner, with the figures
    of what came by then. SSE comments and events without text are no first token.

        python -m longreach.loadtest.mixed --scale laptop --rate 0.2 --requests 50

        python -m longreach.loadtest.mixed --concurrency 1 --sweep

        python -m longreach.loadtest.mixed --trace trace.jsonl --speed 2
    """
    started = datetime.now(UTC)
    options, workload = _checked(context)
    key = api_key_file.read_text(encoding="utf-8").strip() if api_key_file else None
    endpoint = Endpoint(base_url, model, key)
    try:
        workload = _fitted(workload, options, endpoint)
        if dry_run:
            return
        size = endpoint.text_size()
        runner = Runner(endpoint, workload, size)
        runner.warm_up(options.warm_up)
    except (httpx.HTTPError, NotAnsweredError) as error:
        _console.print(f"{endpoint.url} does not answer: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(_ENDED_BADLY) from error
    folder = out or Path("results/load") / started.strftime("%Y-%m-%dT%H-%M-%S")
    results = Results.new(folder, started, options, workload.slo, endpoint, size)
    measure = _sweep if options.sweep else _run
    measure(runner, options, workload, results)
    _console.print(f"figures and picture are in {folder}", markup=False, soft_wrap=True)


def _checked(context: typer.Context) -> tuple[Options, Workload]:
    """Of the command line."""
    try:
        # As one object, so that what goes together is checked in one place.
        given = {name: context.params[name] for name in Options.model_fields}
        options = Options.model_validate(given)
        return options, options.workload()
    except ValidationError as error:
        raise typer.BadParameter("; ".join(map(_remedy, error.errors()))) from error
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


def _remedy(error: ErrorDetails) -> str:
    where = "".join(f"--{name} ".replace("_", "-") for name in error["loc"])
    return f"{where}{error['msg']}"


def _fitted(workload: Workload, options: Options, endpoint: Endpoint) -> Workload:
    """The same as far as the endpoint has room; says what is sent."""
    longest = endpoint.max_model_len()
    try:
        fitted = workload.cut_to(longest)
        plan = fitted.plan(options.load)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if fitted != workload:
        _console.print(
            f"prompts end where the endpoint does, at {longest:,} tokens with the answer"
        )
    _say(plan, fitted, endpoint, options)
    return fitted


def _say(plan: Plan, workload: Workload, endpoint: Endpoint, options: Options) -> None:
    _console.print(plan_table(plan, workload.slo))
    most = plan.most_seconds + options.warm_up * options.timeout
    if options.sweep:
        _console.print(f"that is the first of {options.steps} loads at most", markup=False)
        most += (options.steps - 1) * (plan.most_seconds + options.timeout)
    _console.print(
        f"to {endpoint.model} at {endpoint.url}: {plan.load}; over after {most / 60:,.0f} minutes "
        f"at most. Before that, {options.warm_up + 2} short prompts that do not count",
        markup=False,
        soft_wrap=True,
    )


def _run(runner: Runner, options: Options, workload: Workload, results: Results) -> None:
    result = runner.run(options.load, partial(watching, slo=workload.slo, console=_console))
    summary = result.summary
    results.keep_run(result)
    _console.print(summary_table(summary, f"what came of it: {result.plan.load}"))
    if len(result.records) < len(result.plan.asks):
        sent = f"{len(result.records):,} of {len(result.plan.asks):,}"
        _console.print(f"sent {sent}: time was up, or somebody ended it", markup=False)
    for line in errors(summary):
        _console.print(line, markup=False)
    _console.print(
        f"{summary.seconds:.1f} s; goodput {summary.good_per_second:.3g} good answers a second; "
        f"{summary.answer_tokens_per_second:.3g} tokens a second out",
        markup=False,
        soft_wrap=True,
    )
    if summary.late is not None and summary.late.p99 > _LATE_SECONDS:
        _console.print(
            f"sent up to {figure(summary.late.p99)} s late (p99): this load test had too little "
            "CPU, and its figures are not the endpoint's alone",
            markup=False,
            soft_wrap=True,
        )
    if summary.whole.wrong and not summary.whole.right:
        _console.print("every answer was wrong; a model with random weights needs --no-check")


def _sweep(runner: Runner, options: Options, workload: Workload, results: Results) -> None:
    assert not isinstance(options.load, TraceLoad), "options do not sweep over a trace"
    unit = "clients" if isinstance(options.load, ClosedLoad) else "requests a second"
    steps: list[Step] = []

    def tell(step: Step) -> None:
        steps.append(step)
        verdict = "holds" if step.holds else "does not hold"
        _console.print(f"{step.load:.3g} {unit}: {verdict}", markup=False)

    watcher = partial(watching, slo=workload.slo, console=_console)
    try:
        runner.sweep(options.load, options.steps, options.hold, watcher, tell)
    except KeyboardInterrupt:
        _console.print("ended by hand; what follows is of the loads until then")
    except NotAnsweredError as error:
        _console.print(f"the endpoint answers no more: {error}", markup=False, soft_wrap=True)
    if not steps:
        raise typer.Exit(_ENDED_BADLY)
    results.keep_sweep(steps, unit)
    _console.print(steps_table(steps, unit))
    most = highest(steps)
    found = "no load that was tried holds" if most is None else f"{most:.3g} {unit} hold"
    more = "; no higher load was tried" if most == max(s.load for s in steps) else ""
    _console.print(f"{found} the SLO{more}", markup=False)


if __name__ == "__main__":
    typer.run(main)
