"""The `longreach` command.

Whatever is slow to import is imported inside the commands, so that `--help` answers at once.
"""

import secrets
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...engine.errors import ConfigurationError, InvalidRequestError, LongreachError
from ...engine.text.files import read_text
from ..remedies import remedied
from .commands import Commands

app = typer.Typer(
    name="longreach",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A cluster's YAML file, as configs/laptop.yaml.")
]
BaseUrl = Annotated[str, typer.Option(help="The endpoint to ask.")]
ApiKeyFile = Annotated[
    Path | None, typer.Option(help="A file with an API key, if the endpoint wants one.")
]

_LAPTOP = Path("configs/laptop.yaml")
_LOCAL = "http://127.0.0.1:8000"


@app.callback()
def longreach() -> None:
    """Serve prompts of a million tokens, and ask questions about them.

    Try it on this machine, with the small model that is bundled:

        longreach demo --tokens 65536 --exit

    Then keep a cluster up in one terminal, and ask it about your own text in another:

        longreach serve configs/laptop.yaml

        longreach ask --file book.txt "Who is the narrator?"
    """


@app.command()
def serve(
    config: Config,
    address: Annotated[
        str | None,
        typer.Option(help='Of a Ray cluster that runs already: "auto", or HOST:PORT of its GCS.'),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="With --address: leave it there once it is ready.")
    ] = False,
) -> None:
    """Start the cluster of CONFIG and keep it up until Ctrl-C or SIGTERM.

    Accepted requests are finished before it stops, up to `shutdown.drain_seconds`, at Ctrl-C and
    at SIGTERM; a second one does not wait. Should Ray break down under it, it ends every process
    of the cluster and itself, with status 1. See `longreach config CONFIG` for what it would start.

    With `--address` the application is deployed on that Ray cluster, in place of the one that is
    there, which finishes what it has accepted. Ray itself stays.

        longreach serve configs/laptop.yaml

        longreach serve configs/laptop.yaml --address auto --detach
    """
    from ..settings import load_settings, read_settings
    from .demo import show_urls
    from .running import deploy_detached, running_cluster, wait_for_interrupt

    if detach and address is None:
        raise ConfigurationError(
            "a cluster of this machine alone ends with this command; leave --detach out, or name a "
            "Ray cluster with --address"
        )
    console = Console()
    # The checkpoint of a cluster of several machines need not lie on this one.
    settings = load_settings(config) if address is None else read_settings(config)
    if detach and address is not None:
        deploy_detached(settings, console, address)
        return
    with running_cluster(settings, console, address) as cluster:
        show_urls(cluster.url, settings.model.name, console)
        wait_for_interrupt()


@app.command()
def demo(
    config: Config = _LAPTOP,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the whole prompt.")] = 1 << 20,
    exit_: Annotated[
        bool, typer.Option("--exit", help="End after the answer; status 0 only if it is right.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, talk on the other.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Repeat a document; else every run has its own.")
    ] = None,
    depth: Annotated[
        float | None, typer.Option(min=0, max=1, help="Where the key lies, 0 to 1; else anywhere.")
    ] = None,
) -> None:
    """Start a cluster, hide a pass key in a long document, and ask for it.

    Shows the prefill as it happens, the answer, and where the time went; then stays up until
    Ctrl-C.

        longreach demo --tokens 1048576

        longreach demo --tokens 65536 --exit --json --seed 7 --depth 0.1
    """
    from ..settings import load_settings
    from .demo import DemoOptions, ask_for_hidden_key, show, show_urls
    from .running import running_cluster, wait_for_interrupt

    console = Console(stderr=as_json)
    settings = load_settings(config)
    chosen = secrets.randbelow(1_000_000) if seed is None else seed
    with running_cluster(settings, console) as cluster:
        options = DemoOptions(tokens, chosen, depth)
        report = ask_for_hidden_key(cluster.url, options, cluster.seconds_to_ready, console)
        show(report, console)
        if as_json:
            print(report.to_json(), flush=True)
        if not exit_:
            show_urls(cluster.url, report.model, console)
            wait_for_interrupt()
    if exit_ and not report.correct:
        raise typer.Exit(1)


@app.command()
def ask(
    question: Annotated[
        str | None, typer.Argument(help="What to ask; without it, a conversation.")
    ] = None,
    file: Annotated[
        list[str],
        typer.Option("--file", "-f", help="A file, a folder, or - for standard input; repeatable."),
    ] = [],  # noqa: B006 (typer copies it)
    base_url: BaseUrl = _LOCAL,
    model: Annotated[str | None, typer.Option(help="Else the first that is served.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    api_key_file: ApiKeyFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Each answer as one JSON object on a line of its own.")
    ] = False,
) -> None:
    """Ask a running endpoint about documents: text in any encoding, PDFs, whole folders.

    Of a git repository it takes what git tracks, of another folder all but hidden files; what is no
    text is left out, and said. Several files go under headings with their names. The answer goes
    to standard output, progress and the number of tokens, which is said first, to the other.

        longreach ask --file book.txt "Who is the narrator?"

        longreach ask -f src -f README.md "Where is a request cancelled?"

        git log | longreach ask -f - --base-url http://10.0.0.7:8000 "What broke in May?" > out

        longreach ask -f report.pdf        # one question after the other, until Ctrl-D
    """
    from ..client import Endpoint
    from .ask import Asking, ask_once, converse, questions_from, say_what_is_asked_about
    from .documents import STANDARD_INPUT, read_documents

    if not file:
        raise InvalidRequestError("no document is named; add --file with a file, a folder or -")
    if question is None and STANDARD_INPUT in file:
        raise InvalidRequestError(
            "a conversation reads its questions from standard input, which holds a document; "
            "give a question, or save the document to a file"
        )
    console = Console(stderr=True)
    documents = read_documents(file)
    say_what_is_asked_about(documents, console)
    endpoint = Endpoint(base_url, read_text(api_key_file).strip() if api_key_file else None)
    served = endpoint.served(model)
    asking = Asking(endpoint, served.name, served.max_model_len, max_tokens, as_json)
    if question is not None:
        ask_once(asking, documents, question, console)
        return
    read_line = partial(console.input, "> ") if sys.stdin.isatty() else input
    converse(asking, documents, questions_from(read_line), console)


@app.command()
def config(config: Config) -> None:
    """Check CONFIG and say in plain words what it would run, and where.

    Starts nothing. Status 0 means that the file is valid.

        longreach config configs/laptop.yaml
    """
    from ..settings import load_settings
    from .explain import explain

    Console().print(explain(load_settings(config)))


@app.command()
def exporter(
    directory: Annotated[Path, typer.Argument(help="`metrics.directory` of the cluster.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="And its port.")] = 9464,
) -> None:
    """Answer Prometheus's scrapes with the figures of this node, until Ctrl-C or SIGTERM.

    Reads what the processes of a cluster leave in DIRECTORY, whether they live or not.

        longreach exporter /var/lib/longreach/metrics --host 0.0.0.0
    """
    from ..metrics.exporter import export
    from .running import end_politely, wait_for_interrupt

    end_politely()
    server, _ = export(directory, host, port)
    wait_for_interrupt()
    server.shutdown()


@app.command()
def drain(
    directory: Annotated[Path, typer.Argument(help="`metrics.directory` of the cluster.")],
    seconds: Annotated[float, typer.Option(min=1, help="How long it may take.")] = 1800.0,
) -> None:
    """Have this node of a Ray cluster take no more work, and wait until what it has is done.

    For what runs before a pod is ended (`preStop`). Serve starts the node's replicas elsewhere
    first, where there is room, and prompts go on there. Status 1 where something was still under
    way when time was up.

        longreach drain /var/lib/longreach/metrics --seconds 1800
    """
    from ..draining import drain_this_node

    if not drain_this_node(directory, seconds):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; errors that users can do something about are one line, no trace."""
    try:
        app()
    except LongreachError as error:
        print(f"longreach: {remedied(error)}", file=sys.stderr)
        sys.exit(1)
