"""Pydantic AI: an agent with an output type, by a tool and by a schema."""

from checks import BASE_URL, MODEL, MOST_TOKENS, TEXT, check, end
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE_URL, api_key="none"))


class City(BaseModel):
    name: str = Field(max_length=8)


def said() -> None:
    agent = Agent(model, model_settings={"max_tokens": MOST_TOKENS, "temperature": 0})
    assert agent.run_sync(TEXT).output


def typed(output: object) -> None:
    agent = Agent(model, output_type=output, model_settings={"max_tokens": 200}, retries=0)
    assert isinstance(agent.run_sync(TEXT).output, City)


check("text", said)
check("output by a tool", lambda: typed(City))
check("output by a schema", lambda: typed(NativeOutput(City)))
end()
