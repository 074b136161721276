"""Which state of the repository something was measured with."""

import subprocess


def commit() -> str:
    """Of the working directory's repository; "unknown" outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
