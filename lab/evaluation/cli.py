"""The commands of `longreach eval`, an entry point of the group `longreach.commands`.

Whatever is slow to import is imported inside the commands, so that `--help` answers at once.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ...engine.errors import ConfigurationError, InvalidRequestError
from ...engine.model.config import WeightFormat
from ...engine.model.pocket import CHECKPOINT
from ...engine.text.files import read_text
from .options import (
    Checkpoint,
    Device,
    DtypeName,
    FirstSeed,
    Kept,
    LastQueries,
    Length,
    Lengths,
    LongPrompts,
    Out,
    Prompts,
    Text,
    Variants,
    budget_of,
    depths_of,
    kept_as,
    length_of,
    lengths_of,
    place_of,
    tasks_of,
    variants_of,
)

if TYPE_CHECKING:
    from .answerer import Answerer
    from .records import Record
    from .subject import Subject
    from .tasks import Task

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)

_ANSWER_ROOM = 512


@app.callback()
def evaluate(
    context: typer.Context,
    endpoint: Annotated[
        str | None, typer.Option(help="Ask this endpoint; else a checkpoint in this process.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Else the first that is served.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with an API key, if the endpoint wants one.")
    ] = None,
    characters_per_token: Annotated[
        float | None, typer.Option(help="Of the endpoint's model; else it is asked.")
    ] = None,
) -> None:
    """Measure how often a model is right, and what its sparse prefill loses.

    In process with the bundled model, or any endpoint that speaks OpenAI's protocol:

        longreach eval needles --lengths 2K,8K,32K

        longreach eval --endpoint http://127.0.0.1:8000 needles --lengths 64K,1M --prompts 5
    """
    if endpoint is None:
        return

    def connect() -> "Answerer":
        from .endpoint import EndpointAnswerer

        key = read_text(api_key_file).strip() if api_key_file else None
        return EndpointAnswerer(endpoint, model, key, characters_per_token)

    context.obj = connect


@app.command()
def needles(
    context: typer.Context,
    lengths: Lengths = "2K,8K,32K,64K",
    depths: Annotated[str, typer.Option(help="0 (start) to 1 (end), or any.")] = "0,.25,.5,.75,1",
    tasks: Annotated[
        str, typer.Option(help="Which of pass-key,key-value,one-of-12-facts.")
    ] = "pass-key,key-value",
    variants: Variants = "dense,no-temperature,plain,sparse",
    prompts: Prompts = 5,
    long_prompts: LongPrompts = None,
    first_seed: FirstSeed = 0,
    checkpoint: Checkpoint = CHECKPOINT,
    device: Device = None,
    dtype: DtypeName = None,
    out: Out = Path("results/needles"),
) -> None:
    """Ask for one fact hidden in a document, at every length and depth.

    Writes prompts.jsonl, summary.json and picture.png; the same command goes on where it was
    interrupted.

        longreach eval needles --lengths 2K,8K,32K --prompts 10

        longreach eval needles --tasks pass-key,one-of-12-facts --depths any --prompts 50
    """
    from .tasks import NEEDLES

    _check_drawing()
    chosen = tasks_of(tasks, NEEDLES)
    answerer = _answerer(context, checkpoint, variants, lengths, device, dtype)
    _run(answerer, chosen, lengths, depths_of(depths), (prompts, long_prompts, first_seed), out)


@app.command()
def ruler(
    context: typer.Context,
    lengths: Lengths = "4K,8K,16K,32K",
    tasks: Annotated[str, typer.Option(help="RULER's names, or all.")] = "all",
    variants: Variants = "dense",
    prompts: Prompts = 10,
    long_prompts: LongPrompts = None,
    first_seed: FirstSeed = 0,
    checkpoint: Checkpoint = CHECKPOINT,
    device: Device = None,
    dtype: DtypeName = None,
    out: Out = Path("results/ruler"),
) -> None:
    """Ask RULER's questions, as far as they need no download.

    The tasks: niah_single_1, niah_multikey_2, niah_multikey_3, niah_multivalue, niah_multiquery,
    vt, cwe, fwe.

        longreach eval ruler --tasks niah_single_1,vt --lengths 4K,16K
    """
    from .ruler import RULER

    _check_drawing()
    chosen = RULER if tasks == "all" else tasks_of(tasks, RULER)
    answerer = _answerer(context, checkpoint, variants, lengths, device, dtype)
    _run(answerer, chosen, lengths, [None], (prompts, long_prompts, first_seed), out)


@app.command()
def recall(
    context: typer.Context,
    length: Length = "64K",
    prompts: Prompts = 2,
    text: Text = None,
    first_seed: FirstSeed = 0,
    last_queries: LastQueries = None,
    checkpoint: Checkpoint = CHECKPOINT,
    device: Device = None,
    dtype: DtypeName = None,
    weights: Kept = "auto",
    out: Out = Path("results/recall"),
) -> None:
    """Measure how much of full attention each head keeps under sparse prefill.

    Writes recall.json and recall.png. The text is made up unless a file is named.

        longreach eval recall --length 64K

        longreach eval recall --checkpoint Qwen2.5-7B-Instruct-1M --text book.txt --device cuda
    """
    from ...engine.kv.formats import dtype_name
    from .in_process import CHUNK_TOKENS, fingerprint, name_of, sparsity_of
    from .picture import draw_recall
    from .recall import RecallReport, measure

    _check_drawing()

    seeds = range(first_seed, first_seed + prompts)
    kept = kept_as(weights)
    subject = _subject(context, checkpoint, length, seeds, text, device, dtype, kept)
    sparsity = sparsity_of(checkpoint)
    if last_queries is not None:
        sparsity = replace(sparsity, last_queries=last_queries)
    meter = measure(subject.model, sparsity, subject.prompts, CHUNK_TOKENS)
    settings = {
        "checkpoint": fingerprint(checkpoint),
        "dtype": dtype_name(subject.model.dtype),
        "device": subject.model.device.type,
        "weights": weights,
        "last_queries": str(sparsity.last_queries),
    }
    longest = max(map(len, subject.prompts))
    measured = RecallReport(
        name_of(checkpoint), settings, len(subject.prompts), longest, tuple(meter.heads())
    )
    out.mkdir(parents=True, exist_ok=True)
    measured.write(out / "recall.json")
    Console().print(measured.table())
    draw_recall(measured, out / "recall.png")


@app.command()
def calibrate(
    context: typer.Context,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Mean recall to reach.")] = 0.95,
    length: Length = "64K",
    prompts: Prompts = 1,
    text: Text = None,
    first_seed: FirstSeed = 0,
    start: Annotated[
        str | None, typer.Option(help="VERTICALS,SLASHES to begin with; else the checkpoint's.")
    ] = None,
    most: Annotated[str, typer.Option(help="VERTICALS,SLASHES that no head grows beyond.")] = (
        "4096,16384"
    ),
    checkpoint: Checkpoint = CHECKPOINT,
    device: Device = None,
    dtype: DtypeName = None,
    out: Out = Path("results/calibrate"),
) -> None:
    """Grow sparse budgets until every head keeps enough of full attention.

    Writes sparse_attention_config.json into the folder of --out, which may be the checkpoint's.

        longreach eval calibrate --threshold 0.9 --length 64K
    """
    from ...kernels.sparse import HeadBudget
    from ..pocket.export import write_budgets
    from .calibration import Round, grow_budgets, uniform
    from .in_process import CHUNK_TOKENS, sparsity_of

    seeds = range(first_seed, first_seed + prompts)
    subject = _subject(context, checkpoint, length, seeds, text, device, dtype)
    first = uniform(subject.model, *budget_of(start)) if start else sparsity_of(checkpoint)
    console = Console()

    def show(done: Round) -> None:
        mean = sum(each.mean for each in done.recalls) / len(done.recalls)
        console.print(
            f"mean recall {mean:.4f}, lowest {min(each.mean for each in done.recalls):.4f}; "
            f"{len(done.wanting)} of {len(done.recalls)} heads are under {threshold}"
        )

    cap = HeadBudget(*budget_of(most))
    found = grow_budgets(subject.model, first, subject.prompts, threshold, cap, CHUNK_TOKENS, show)
    for layer, heads in enumerate(zip(first.budgets, found.budgets, strict=True)):
        for head, (old, new) in enumerate(zip(*heads, strict=True)):
            if old != new:
                console.print(
                    f"layer {layer}, head {head}: verticals {old.verticals} to {new.verticals}, "
                    f"slashes {old.slashes} to {new.slashes}"
                )
    out.mkdir(parents=True, exist_ok=True)
    write_budgets(out, [[(b.verticals, b.slashes) for b in layer] for layer in found.budgets])


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="A folder that another command wrote.")],
    more: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of the same settings, whose answers are added to it."),
    ] = None,
) -> None:
    """Draw the picture and print the table of results that are there.

    Several processes, on several GPUs, may share a grid by --first-seed: name their folders.

        longreach eval report results/needles

        longreach eval report results/needles results/needles-2 results/needles-3
    """
    from .records import add_records, read_records

    _check_drawing()
    for other in more or ():
        add_records(out / "prompts.jsonl", other / "prompts.jsonl")
    settings, records = read_records(out / "prompts.jsonl")
    if not records:
        raise InvalidRequestError(f"{out} holds no answers yet; run the command that asks again")
    _report(out, settings, records)


def _check_drawing() -> None:
    """Refuse what ends with a picture, before hours are spent on what it would show.

    Raises:
        ConfigurationError: what draws is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigurationError(
            "results are drawn with matplotlib, which is not installed; run pip install matplotlib"
        )


def _run(
    answerer: "Answerer",
    tasks: "tuple[Task, ...]",
    lengths: str,
    depths: list[float | None],
    prompts: tuple[int, int | None, int],
    out: Path,
) -> None:
    from .records import RecordFile
    from .running import Grid, run

    count, long_count, first_seed = prompts
    grid = Grid(tasks, lengths_of(lengths), depths, count, long_count or count, first_seed)
    settings = {"model": answerer.model, **answerer.settings}
    file = RecordFile(out / "prompts.jsonl", settings)
    run(answerer, grid, file, Console(stderr=True))
    _report(out, settings, file.records)


def _report(out: Path, settings: dict[str, str], records: "list[Record]") -> None:
    from .picture import draw
    from .summary import Summary

    summary = Summary.of(settings, records)
    summary.write(out / "summary.json")
    Console().print(summary.table())
    draw(summary, out / "picture.png")


def _answerer(
    context: typer.Context,
    checkpoint: Path,
    variants: str,
    lengths: str,
    device: str | None,
    dtype: str | None,
) -> "Answerer":
    """The endpoint that was named before the command, else the checkpoint in this process."""
    connect: Callable[[], Answerer] | None = context.obj
    if connect is not None:
        _refuse_with_endpoint(context, "checkpoint", "variants", "device", "dtype")
        return connect()
    from .in_process import InProcessAnswerer

    most = max(lengths_of(lengths)) + _ANSWER_ROOM
    return InProcessAnswerer(checkpoint, variants_of(variants), most, *place_of(device, dtype))


def _refuse_with_endpoint(context: typer.Context, *names: str) -> None:
    """Refuse what was asked for on the command line and an endpoint cannot give."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InvalidRequestError(
                f"--{name} is for checkpoints in this process; leave it out, or --endpoint"
            )


def _subject(
    context: typer.Context,
    checkpoint: Path,
    length: str,
    seeds: range,
    text: Path | None,
    device: str | None,
    dtype: str | None,
    weights: WeightFormat = "auto",
) -> "Subject":
    from .subject import Subject

    if context.obj is not None:
        raise InvalidRequestError("an endpoint does not show its attention; leave --endpoint out")
    tokens, where = length_of(length), place_of(device, dtype)
    if text is not None:
        return Subject.of_file(checkpoint, text, tokens, *where, weights)
    return Subject.of_seeds(checkpoint, seeds, tokens, *where, weights=weights)
