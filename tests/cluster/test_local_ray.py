"""A real Ray, in a process of its own, because what it does to its process lasts."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from longreach.cluster.local_ray import check_address, check_tokens
from longreach.engine.errors import UnavailableError

PROGRAM = """
import json, os, signal, sys, time
import psutil, ray
from longreach.cluster.local_ray import LocalRay, check_tokens

def handler(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, handler)
started = LocalRay.start()

@ray.remote(num_cpus=0)
class Busy:
    def pid(self):
        return os.getpid()
    def work(self):
        while True:
            pass

actor = Busy.remote()
pid = ray.get(actor.pid.remote())
actor.work.remote()
us = psutil.Process()
everybody = [us, *us.children(recursive=True)]
addresses = {c.laddr.ip for p in everybody for c in p.net_connections() if c.status == "LISTEN"}
found = {
    "handler": signal.getsignal(signal.SIGTERM) is handler,
    "addresses": sorted(addresses),
    "ended": started.ended(),
    "silent": started.silent(),
}
if sys.argv[1] != "nothing":
    name, number = sys.argv[1].split()
    [victim] = [p for p in everybody if p.name() == name]
    victim.send_signal(int(number))
    time.sleep(0.5)
    found.update(ended_after=started.ended(), silent_after=started.silent())
began = time.monotonic()
started.stop()
found["seconds"] = time.monotonic() - began
found["left"] = [p.status() for p in us.children(recursive=True)]
found["worker_is_gone"] = not psutil.pid_exists(pid)
try:
    ray.get_actor("late")
except ray.exceptions.RayError as error:
    found["late"] = type(error).__name__
found["anew"] = [p.name() for p in us.children(recursive=True)]
print(json.dumps(found))
"""


def run(broken: str) -> dict[str, Any]:
    """What a process found that started Ray, broke it in this way, and stopped it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, broken],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_it_is_closed_to_others_keeps_our_handlers_and_leaves_nothing() -> None:
    """That it asks for tokens although the environment says otherwise is what `start` checks."""
    found = run("nothing")
    assert found["handler"]
    assert set(found["addresses"]) <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert (found["ended"], found["silent"]) == (None, [])
    assert (found["left"], found["worker_is_gone"]) == ([], True)
    assert found["late"] == "RaySystemError", "who calls Ray a moment late starts no other"
    assert found["anew"] == []


def test_a_killed_raylet_is_noticed_and_its_workers_do_not_outlive_it() -> None:
    """For a killed GCS see the chaos suite's short version."""
    found = run(f"raylet {signal.SIGKILL:d}")
    assert found["ended"] is None
    assert "raylet" in found["ended_after"]
    assert (found["left"], found["worker_is_gone"]) == ([], True)


def test_a_part_that_hangs_is_silent_and_does_not_keep_us_from_ending() -> None:
    found = run(f"raylet {signal.SIGSTOP:d}")
    assert found["ended_after"] is None
    assert found["silent_after"] == ["raylet"]
    assert found["seconds"] < 40
    assert (found["left"], found["worker_is_gone"]) == ([], True)


@contextmanager
def server(code: grpc.StatusCode) -> Iterator[str]:
    """Answers every call with this status."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
                if code is not grpc.StatusCode.OK:
                    context.abort(code, "")
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    made = grpc.server(ThreadPoolExecutor(1), handlers=[Handler()])
    port = made.add_insecure_port("127.0.0.1:0")
    made.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        made.stop(0).wait()


def test_who_answers_without_a_token_is_refused() -> None:
    with server(grpc.StatusCode.UNAUTHENTICATED) as closed:
        check_tokens({"gcs_server": closed, "raylet": closed})
        with server(grpc.StatusCode.OK) as opened, pytest.raises(UnavailableError):
            check_tokens({"gcs_server": closed, "raylet": opened})


def test_another_address_than_the_loopback_one_is_refused() -> None:
    check_address("127.0.0.1")
    with pytest.raises(UnavailableError):
        check_address("192.0.2.2")
