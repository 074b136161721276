"""OpenAI's agents: a tool is called, and its result goes back into the next request."""

from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from checks import BASE_URL, MODEL, TEXT, check, end
from openai import AsyncOpenAI

set_tracing_disabled(disabled=True)
called: list[str] = []


@function_tool
def find(name: Literal["Paris", "Rome"]) -> str:
    """Find a city."""
    called.append(name)
    return "found"


def run(kind: type[OpenAIChatCompletionsModel | OpenAIResponsesModel]) -> None:
    called.clear()
    client = AsyncOpenAI(base_url=BASE_URL, api_key="none", max_retries=0)
    agent = Agent(
        name="finder", instructions="Find the city.", tools=[find],
        model=kind(model=MODEL, openai_client=client),
        model_settings=ModelSettings(tool_choice="required", max_tokens=100, temperature=0),
    )  # fmt: skip
    # What was required once is not required when its result has come.
    result = Runner.run_sync(agent, TEXT, max_turns=3)
    assert called
    assert isinstance(result.final_output, str)


check("chat completions", lambda: run(OpenAIChatCompletionsModel))
check("responses", lambda: run(OpenAIResponsesModel))
end()
