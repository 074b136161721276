"""Which clients there are, what each needs, and how it is run."""

import json
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"
# In the versions that docs/load.md is about.
_AS_IN_LOAD_TESTS = ("--constraint", str(Path(__file__).parents[2] / "loadtest" / "tools.txt"))
_INSTALL_SECONDS = 600


@dataclass(frozen=True)
class Target:
    """The endpoint that clients are pointed at; `base_url` with `/v1`."""

    base_url: str
    model: str
    page_port: int


@dataclass(frozen=True)
class Client(ABC):
    """One client in an environment of its own, which is made once.

    `packages` have versions, so that the same is run everywhere. `shown` is its package whose
    version the page says; `ran` what is run, in words. `quick` ones are run by CI.
    """

    name: str
    packages: tuple[str, ...]
    shown: str
    ran: str
    quick: bool = field(default=False, kw_only=True)

    @abstractmethod
    def install(self, folder: Path) -> None:
        """Make the environment.

        Raises:
            subprocess.SubprocessError: a package cannot be had.
        """

    @abstractmethod
    def version(self, folder: Path) -> str:
        """Of the package that is shown."""

    @abstractmethod
    def command(self, folder: Path, target: Target) -> Sequence[str]:
        """What runs it."""

    def missing(self) -> str | None:
        """What this machine lacks that cannot be installed into an environment."""
        return None


@dataclass(frozen=True)
class PythonClient(Client):
    """A script for Python, or another command of its environment."""

    script: str

    def install(self, folder: Path) -> None:
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(folder / "bin/pip"), "install", "--quiet", "--no-compile", *self.packages])

    def version(self, folder: Path) -> str:
        code = f"from importlib.metadata import version; print(version({self.shown!r}))"
        return _run([str(folder / "bin/python"), "-c", code]).strip()

    def command(self, folder: Path, target: Target) -> Sequence[str]:
        python, script = folder / "bin/python", SCRIPTS / self.script
        return [str(python), str(script), target.base_url, target.model]


@dataclass(frozen=True)
class CommandClient(PythonClient):
    """A command of a Python package; of its arguments, `{}` are filled in."""

    arguments: tuple[str, ...]

    def command(self, folder: Path, target: Target) -> Sequence[str]:
        known: Mapping[str, str] = {
            "base_url": target.base_url,
            "root_url": target.base_url.removesuffix("/v1"),
            "model": target.model,
            "scripts": str(SCRIPTS),
            "out": str(folder / "out"),
        }
        arguments = [argument.format_map(known) for argument in self.arguments]
        return [str(folder / "bin" / self.script), *arguments]


@dataclass(frozen=True)
class NodeClient(Client):
    """A script for Node; it finds its packages in the environment's folder."""

    script: str
    needs_browser: bool = False

    def missing(self) -> str | None:
        if shutil.which("npm") is None:
            return "npm is not installed"
        if self.needs_browser and _chromium() is None:
            return "Chromium is not installed (apt-get install chromium)"
        return None

    def install(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _run(["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", *self.packages])

    def version(self, folder: Path) -> str:
        package = folder / "node_modules" / self.shown / "package.json"
        return json.loads(package.read_text(encoding="utf-8"))["version"]

    def command(self, folder: Path, target: Target) -> Sequence[str]:
        # Node looks for packages beside a script.
        for name in (self.script, "checks.mjs"):
            shutil.copy(SCRIPTS / name, folder / name)
        browser = [_chromium() or "", str(target.page_port)] if self.needs_browser else []
        script = str(folder / self.script)
        return ["node", script, target.base_url, target.model, *browser]


def _chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser")


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False
    )
    if done.returncode:
        raise subprocess.SubprocessError(done.stderr.strip()[-500:])
    return done.stdout


SUITE: tuple[Client, ...] = (
    PythonClient(
        "openai-python", ("openai==3.57.0",), "openai",
        "chats, completions, structured output, tools, responses; whole and streamed",
        "openai_python.py", quick=True,
    ),
    NodeClient(
        "openai-node", ("openai@6.49.0",), "openai", "streams, `runTools`, responses",
        "openai_node.mjs", quick=True,
    ),
    PythonClient(
        "LangChain", ("langchain-openai==1.7.4",), "langchain-openai",
        "`ChatOpenAI`: invoke, stream, structured output by three methods, tools",
        "langchain_openai_client.py", quick=True,
    ),
    PythonClient(
        "LiteLLM", ("litellm[proxy]==1.108.7",), "litellm", "the library, streamed, and the proxy",
        "litellm_client.py",
    ),
    NodeClient(
        "Vercel AI SDK", ("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7"), "ai",
        "`generateText`, `streamText`, structured output, tools", "ai_sdk.mjs", quick=True,
    ),
    PythonClient(
        "instructor", ("instructor==1.17.0",), "instructor", "by tools and by JSON schema",
        "instructor_client.py",
    ),
    PythonClient(
        "Pydantic AI", ("pydantic-ai-slim[openai]==2.68.0",), "pydantic-ai-slim",
        "an agent: text, output by a tool, output by a schema", "pydantic_ai_client.py",
    ),
    PythonClient(
        "LlamaIndex", ("llama-index-llms-openai-like==0.8.1",), "llama-index-llms-openai-like",
        "`OpenAILike`: chat, stream, completion, structured output", "llama_index_client.py",
    ),
    PythonClient(
        "OpenAI Agents", ("openai-agents==0.24.0",), "openai-agents",
        "an agent that calls a tool and goes on, by chats and by responses",
        "openai_agents_client.py",
    ),
    PythonClient(
        "guidellm", ("guidellm", *_AS_IN_LOAD_TESTS), "guidellm", "8 streamed chats, two at a time",
        "guidellm_client.py",
    ),
    PythonClient(
        "AIPerf", ("aiperf", *_AS_IN_LOAD_TESTS), "aiperf", "8 streamed chats, two at a time",
        "aiperf_client.py",
    ),
    PythonClient(
        "JSON Schema Test Suite", ("openai==3.57.0", "jsonschema==4.26.0"), "jsonschema",
        "answers held to each of its schemas, which are valid or refused; hostile ones",
        "json_schema_suite.py",
    ),
    CommandClient(
        "schemathesis", ("schemathesis==4.32.5",), "schemathesis",
        "every path of `/openapi.json`, with what it describes and with what it does not",
        "schemathesis",
        (
            "--config-file", "{scripts}/schemathesis.toml", "run", "{root_url}/openapi.json",
            "--phases", "coverage,fuzzing", "--max-examples", "5", "--request-timeout", "60",
            "--max-time", "120",
        ),
    ),
    CommandClient(
        "lm-eval", ("lm-eval[api]==0.4.13",), "lm_eval",
        "a local task of log-likelihoods and one of generation", "lm_eval",
        (
            "run", "--model", "local-completions", "--tasks", "choices,answers",
            "--include_path", "{scripts}/lm_eval", "--model_args",
            "model={model},base_url={base_url}/completions,tokenizer_backend=remote",
        ),
    ),
    NodeClient(
        "headless Chromium", ("puppeteer-core@24.43.1",), "puppeteer-core",
        "a page of another origin that streams and reads an error; `/docs`", "browser.mjs", True,
        quick=True,
    ),
)  # fmt: skip
