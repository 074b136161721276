"""Whether an endpoint is ready, asked without its client."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from longreach.cluster.readiness import is_ready


class Handler(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/ready" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(("status", "ready"), [(200, True), (503, False), (404, False)])
def test_only_an_endpoint_that_says_so_is_ready(
    url: str, monkeypatch: pytest.MonkeyPatch, status: int, ready: bool
) -> None:
    monkeypatch.setattr(Handler, "status", status)
    # A proxy of the environment is for others than this machine's own endpoint.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert is_ready(url) is ready


def test_nobody_is_not_ready() -> None:
    assert is_ready("http://127.0.0.1:9") is False
