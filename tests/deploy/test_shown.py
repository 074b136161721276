"""What is asked of a Prometheus for the panels, and what is said of its answers."""

import http.server
import json
import math
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from longreach.deploy.dashboards.boards import BOARDS
from longreach.deploy.dashboards.panels import Board, Panel, Query
from longreach.deploy.dashboards.pictures import Curve, draw
from longreach.deploy.dashboards.prometheus import Prometheus, QueryError, Series, Span
from longreach.deploy.dashboards.shown import VARIABLES, problems, shown

SPAN = Span(1000.0, 1010.0, 1.0)


@contextmanager
def answering(status: int, result: list[dict[str, object]]) -> Iterator[tuple[str, list[str]]]:
    """A server that says the same to everything; its URL, and the queries that came."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            asked.extend(query["query"])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"data": {"result": result}}).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def series(*values: str) -> dict[str, object]:
    return {
        "metric": {"role": "decode"},
        "values": [[1000.0 + number, value] for number, value in enumerate(values)],
    }


def test_variables_are_filled_in() -> None:
    with answering(200, [series("1", "2.5")]) as (url, asked):
        prometheus = Prometheus(url, "1m", VARIABLES)
        (found,) = prometheus.over('rate(a{model_name=~"$model"}[$__rate_interval]) * $gpus', SPAN)
    assert asked == ['rate(a{model_name=~".*"}[1m]) * 8']
    assert found == Series({"role": "decode"}, (1000.0, 1001.0), (1.0, 2.5))


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ([series("1", "2")], None),
        ([], "shows nothing"),
        ([series("1"), series("2", "NaN")], "no number"),
        ([series("+Inf")], "no number"),
    ],
)
def test_what_is_wrong_with_panels_is_told(
    result: list[dict[str, object]], said: str | None
) -> None:
    with answering(200, result) as (url, asked):
        found = list(problems(Prometheus(url, "1m", VARIABLES), SPAN, ["longreach"]))
    panels = [panel for board in BOARDS for panel in board.panels]
    wrong = sum(panel.source == "longreach" for panel in panels) if said else 0
    assert len(found) == wrong
    assert all(said is not None and said in each for each in found)
    assert len(asked) == sum(len(panel.queries) for panel in panels)
    assert not any("$" in query for query in asked)


def test_each_board_has_a_picture(tmp_path: Path) -> None:
    with answering(200, [series("1", "2")]) as (url, _):
        found = list(problems(Prometheus(url, "1m", VARIABLES), SPAN, ["longreach"], tmp_path))
    assert not found
    assert {path.stem for path in tmp_path.iterdir()} == {board.name for board in BOARDS}


def test_curves_have_the_names_of_the_legend() -> None:
    board = Board("b", "B", (Panel("p", "s", "", (Query("up", "{{role}} of gang {{gang}}"),)),))
    with answering(200, [series("1")]) as (url, _):
        (panel,) = shown(Prometheus(url, "1m"), board, SPAN)
    assert [curve.name for curve in panel.curves] == ["decode of gang"]


def test_a_query_that_is_refused_and_a_server_that_is_none_are_told() -> None:
    with answering(400, []) as (url, _):
        assert "is refused" in next(problems(Prometheus(url, "1m"), SPAN, ["longreach"]))
    with pytest.raises(QueryError):
        Prometheus(url, "1m").over("up", SPAN)


def test_a_picture_of_nothing_and_of_no_numbers_is_drawn_too(tmp_path: Path) -> None:
    panel = Panel("one", "s", "", (Query("up", "up"),), red=2.0)
    apart = Series({}, (1000.0, 1001.0, 1008.0), (1.0, 3.0, 2.0))
    numbers = [Series({}, (1000.0,), (value,)) for value in (math.nan, math.inf)]
    shown = [(panel, [Curve("up", each)]) for each in (apart, *numbers)]
    draw("Title", [*shown, (panel, [])], SPAN, tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
