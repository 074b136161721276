"""LangChain's ChatOpenAI."""

from checks import BASE_URL, MODEL, MOST_TOKENS, TEXT, check, end
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=8)


@tool
def find(name: str) -> str:
    """Find a city."""
    return name


def model(tokens: int) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=BASE_URL, api_key="none", model=MODEL, temperature=0, max_tokens=tokens,
        max_retries=0,
    )  # fmt: skip


def structured(method: str) -> None:
    answer = model(200).with_structured_output(City, method=method).invoke(TEXT)
    assert isinstance(answer, City)


def json_mode() -> None:
    """The form is up to the model; that it is JSON is held."""
    answer = model(200).with_structured_output(City, method="json_mode", include_raw=True)
    assert answer.invoke(TEXT + " Answer in JSON.")["raw"].content.startswith("{")


def bound() -> None:
    answer = model(200).bind_tools([find], tool_choice="required").invoke(TEXT)
    assert answer.tool_calls[0]["name"] == "find"


def said(answer: object) -> None:
    assert answer


check("invoke", lambda: said(model(MOST_TOKENS).invoke(TEXT).content))
check("stream", lambda: said("".join(str(c.content) for c in model(MOST_TOKENS).stream(TEXT))))
check("structured output, json_schema", lambda: structured("json_schema"))
check("structured output, function_calling", lambda: structured("function_calling"))
check("structured output, json_mode", json_mode)
check("tools", bound)
end()
