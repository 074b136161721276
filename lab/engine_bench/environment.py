"""What a line was measured with."""

import shutil
import subprocess
from dataclasses import dataclass
from typing import Self

from ..kernel_bench.measure import environment


@dataclass(frozen=True)
class Environment:
    """The last columns of every line: the GPU, its driver, versions, and the code."""

    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str

    @classmethod
    def of_this_run(cls, commit: str | None) -> Self:
        """Here and now; the code's name is asked of git where none is given."""
        return cls(driver=_driver_version(), **environment(commit))


def _driver_version() -> str:
    """Of the first GPU; "none" where nothing can say."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.split("\n")[0].strip() or "none"
