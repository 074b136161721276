"""An endpoint that answers as it is told to, in place of a cluster."""

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "scripted"


@dataclass
class Script:
    """What the endpoint does next; may be changed while it runs.

    Attributes:
        answer: "right", "wrong", "cut" (no end), "error" (an event), or "refuse" (503).
        seconds: before it answers.
        usage: share of KV pages that it claims to have in use, by role.
        lost_clients: how many were gone when their answer was ready.
    """

    answer: str = "right"
    seconds: float = 0.0
    usage: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})
    lost_clients: int = 0
    requests: int = 0


@contextmanager
def scripted_endpoint(script: Script) -> Iterator[int]:
    """Answers on 127.0.0.1 until the end of the block; gives the port."""
    handler = type("Handler", (_Handler,), {"script": script})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    script: Script

    def do_GET(self) -> None:
        if self.path == "/metrics":
            usage = "longreach_kv_cache_usage_perc"
            lines = (
                f'{usage}{{model_name="m",role="{role}"}} {share}'
                for role, share in self.script.usage.items()
            )
            self._send("# HELP\n" + "\n".join(lines) + "\n")
        else:
            self._send(json.dumps({"data": [{"id": MODEL}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self._send(json.dumps({"count": len(body["prompt"]) // 4}))
            return
        self.script.requests += 1
        time.sleep(self.script.seconds)
        if self.script.answer == "refuse":
            self.send_error(503)
            return
        try:
            self._stream(body["messages"][0]["content"])
        except OSError:
            self.script.lost_clients += 1

    def _stream(self, text: str) -> None:
        key = re.findall(r"The pass key is (\d+)", text)[0]
        said = key if self.script.answer != "wrong" else str(int(key) + 1)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._event(json.dumps({"choices": [{"delta": {"content": said[:2]}}]}))
        if self.script.answer == "error":
            self._event(json.dumps({"error": {"message": "a rank died"}}))
        if self.script.answer in ("right", "wrong"):
            self._event(json.dumps({"choices": [{"delta": {"content": f"{said[2:]}."}}]}))
            self._event("[DONE]")

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests say what went wrong."""
