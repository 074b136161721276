"""Finding and ending all processes of a session, whoever their parent is by then."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

PROGRAM = """
import os, subprocess, sys, time
from pathlib import Path
import psutil
from longreach.cluster.process_tree import adopt_orphans, kill_session, session_processes

session = Path(sys.argv[1])
sleeper = "import time; time.sleep(600)"
# A raylet with a worker, which has a child that writes elsewhere.
start = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}], stdout={})"
worker = start.format(sleeper, subprocess.DEVNULL)
raylet = start.format(worker, None)
adopt_orphans()
other = subprocess.Popen([sys.executable, "-c", sleeper])
with (session / "raylet.out").open("wb") as log:
    started = subprocess.Popen([sys.executable, "-c", raylet], stdout=log, stderr=log)
while len(session_processes(session)) < 3:
    time.sleep(0.05)
everything = session_processes(session)
assert other.pid not in {process.pid for process in everything}
started.kill()
started.wait()
while len(session_processes(session)) > 2:
    time.sleep(0.05)
orphans = session_processes(session)
print(len(orphans), os.getpid() in {process.ppid() for process in orphans})
print(kill_session(session))
left = [process.pid for process in psutil.Process().children(recursive=True)]
print(left == [other.pid])
other.kill()
"""


def test_orphans_are_found_and_ended_and_others_are_not(tmp_path: Path) -> None:
    """In a process of its own: adopting orphans lasts as long as the process."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["2 True", "[]", "True"]
    assert time.monotonic() - began < 30
