"""LlamaIndex's OpenAILike."""

from checks import BASE_URL, MODEL, MOST_TOKENS, TEXT, check, end
from llama_index.core import PromptTemplate
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

llm = OpenAILike(
    model=MODEL, api_base=BASE_URL, api_key="none", is_chat_model=True, context_window=16384,
    max_tokens=MOST_TOKENS, max_retries=0,
)  # fmt: skip
plain = llm.model_copy(update={"is_chat_model": False})
with_tools = llm.model_copy(update={"is_function_calling_model": True, "max_tokens": 200})


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=8)


def said(answer: object) -> None:
    assert answer


def structured() -> None:
    assert isinstance(with_tools.structured_predict(City, PromptTemplate(TEXT)), City)


check("chat", lambda: said(llm.chat([ChatMessage(role="user", content=TEXT)]).message.content))
check("chat, streamed", lambda: said(list(llm.stream_complete(TEXT))[-1].text))
# What the bundled model makes of a text that is no chat may be nothing.
check("completion", lambda: said(plain.complete(TEXT).raw.choices[0].finish_reason))
check("structured output", structured)
end()
