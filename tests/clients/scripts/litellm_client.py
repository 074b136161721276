"""LiteLLM, as a library and as a proxy."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import litellm
from checks import BASE_URL, MODEL, MOST_TOKENS, TEXT, check, end

CALL = {
    "model": f"openai/{MODEL}",
    "api_base": BASE_URL,
    "api_key": "none",
    "messages": [{"role": "user", "content": TEXT}],
    "max_tokens": MOST_TOKENS,
}
WAIT_SECONDS = 90
KEY = "sk-of-this-test-alone-0123456789"


def streamed() -> None:
    chunks = litellm.completion(**CALL, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def whole() -> None:
    assert litellm.completion(**CALL).choices[0].message.content


def proxied() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("litellm")), "--model", CALL["model"], "--api_base",
        BASE_URL, "--port", str(port), "--host", "127.0.0.1",
    ]  # fmt: skip
    # It does not start without a key of its own.
    environment = {"OPENAI_API_KEY": "none", "LITELLM_MASTER_KEY": KEY, "PATH": "/usr/bin:/bin"}
    proxy = subprocess.Popen(command, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_up(url):
            assert time.monotonic() < deadline, "the proxy did not start"
            time.sleep(0.5)
        body = {"model": CALL["model"], "messages": CALL["messages"], "max_tokens": 8}
        for stream in (False, True):
            answer = httpx.post(
                f"{url}/v1/chat/completions", json={**body, "stream": stream}, timeout=60,
                headers={"Authorization": f"Bearer {KEY}"},
            )  # fmt: skip
            answer.raise_for_status()
    finally:
        proxy.terminate()
        proxy.wait()


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/liveliness", timeout=2).is_success
    except httpx.TransportError:
        return False


check("completion", whole)
check("completion, streamed", streamed)
check("proxy", proxied)
end()
