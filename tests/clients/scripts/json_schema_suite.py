"""JSON Schema's own test suite: what the model answers, held to each schema, is valid.

The suite is in the source package of `jsonschema`. Schemas that ask for more than can be held to
are refused by name, and hostile ones in bounded time.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import jsonschema
import openai
from checks import BASE_URL, MODEL, TEXT, check, end

client = openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0, timeout=120)
FOLDER = "json/tests/draft2020-12"
AT_ONCE = 4
# What goes on for as long as it may comes to an end, sooner or later.
ENDING = {str(ord(letter)): 10 for letter in '"]}'}
MOST_SECONDS = 15
HOSTILE = {
    "patterns that cross": {
        "type": "object", "patternProperties": {f"^a{i}.*b{i}$": {} for i in range(900)},
    },
    "nothing matches": {"$ref": "#"},
    "a far reference": {"$ref": "http://127.0.0.1:1/schema"},
    "a huge enumeration": {"enum": [f"{i:030}" for i in range(6000)]},
    "a deep schema": json.loads('{"items": ' * 150 + "{}" + "}" * 150),
    "repetitions of repetitions": {
        "type": "string", "pattern": "((((a{0,90}){0,90}){0,90}){0,90})",
    },
}  # fmt: skip


def suite() -> list[tuple[str, object]]:
    """Names and schemas."""
    name = f"jsonschema=={version('jsonschema')}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--no-binary", ":all:", "--dest", folder, name]  # fmt: skip
        subprocess.run(command, check=True)
        [package] = Path(folder).glob("*.tar.gz")
        with tarfile.open(package) as archive:
            members = [each for each in archive.getmembers() if each.name.endswith(".json")]
            return [
                (f"{Path(member.name).stem}: {case['description']}", case["schema"])
                for member in members
                if Path(member.name).parent.match(f"*/{FOLDER}")
                for case in json.load(archive.extractfile(member))
            ]


def outcome(case: tuple[str, object]) -> str:
    """What came of one schema: held, cut off, or refused."""
    _, schema = case
    form = {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}
    try:
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": TEXT}], max_tokens=100,
            temperature=1, seed=1, logit_bias=ENDING, response_format=form,
        )  # fmt: skip
    except openai.BadRequestError as error:
        return "refused" if error.param.startswith("response_format") else f"refused: {error}"
    choice = answer.choices[0]
    if choice.finish_reason != "stop":
        return "cut off"
    jsonschema.Draft202012Validator(schema).validate(json.loads(choice.message.content))
    return "held"


def whole_suite() -> None:
    cases = suite()
    with ThreadPoolExecutor(AT_ONCE) as asking:
        outcomes = Counter(asking.map(outcome, cases))
    print(dict(outcomes), flush=True)
    assert len(cases) > 300
    assert set(outcomes) <= {"held", "cut off", "refused"}
    assert outcomes["held"] > 120
    assert outcomes["cut off"] < 0.3 * outcomes["held"]


def hostile() -> None:
    for name, schema in HOSTILE.items():
        started = time.monotonic()
        said = outcome((name, schema))
        seconds = time.monotonic() - started
        print(f"{name}: {said} ({seconds:.1f} s)", flush=True)
        assert seconds < MOST_SECONDS, name
        assert said == "refused" or name == "repetitions of repetitions", name


check("the whole suite", whole_suite)
check("hostile schemas", hostile)
end()
