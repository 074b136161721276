"""AIPerf: a few streamed chats, none of which may be an error."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import BASE_URL, CHECKPOINT, MODEL, check, end

REQUESTS = 8


def streamed() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            Path(sys.executable).with_name("aiperf"), "profile", "--model", MODEL,
            "--url", BASE_URL.removesuffix("/v1"), "--endpoint-type", "chat", "--streaming",
            "--tokenizer", CHECKPOINT, "--use-server-token-count",
            "--extra-inputs", "ignore_eos:true", "--isl", "256", "--isl-stddev", "0", "--osl", "16",
            "--concurrency", "2", "--request-count", str(REQUESTS), "--ui", "none",
            "--artifact-dir", folder,
        ]  # fmt: skip
        subprocess.run(command, check=True)
        report = Path(folder) / "profile_export_aiperf.json"
        figures = json.loads(report.read_text(encoding="utf-8"))
    assert figures["request_count"]["avg"] == REQUESTS
    assert not figures["error_summary"]
    assert figures["time_to_first_token"]["avg"] > 0


check("chats, streamed", streamed)
end()
