"""guidellm: a few streamed chats, none of which may be an error."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import BASE_URL, CHECKPOINT, check, end

REQUESTS = 8


def streamed() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        root_url = BASE_URL.removesuffix("/v1")
        command = [
            Path(sys.executable).with_name("guidellm"), "run", "--disable-console",
            "--backend", f"kind=openai_http,target={root_url},request_format=/v1/chat/completions",
            "--tokenizer", f"kind=hf_auto,model={CHECKPOINT}",
            "--data", "kind=synthetic_text,prompt_tokens=256,output_tokens=16",
            "--profile", "kind=concurrent,streams=2",
            "--constraint", f"kind=max_requests,count={REQUESTS}",
            "--output", f"kind=json,path={report}",
        ]  # fmt: skip
        subprocess.run(command, check=True, env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"})
        [benchmark] = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    metrics = benchmark["metrics"]
    assert metrics["request_totals"]["successful"] == REQUESTS, metrics["request_totals"]
    assert metrics["time_to_first_token_ms"]["successful"]["mean"] > 0


check("chats, streamed", streamed)
end()
