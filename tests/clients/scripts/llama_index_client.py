"""LlamaIndex's OpenAILike."""

from checks import BASE_URL, MODEL, MOST_TOKENS, TEXT, check, end
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model=MODEL, api_base=BASE_URL, api_key="none", is_chat_model=True, context_window=16384,
    max_tokens=MOST_TOKENS, max_retries=0,
)  # fmt: skip
plain = llm.model_copy(update={"is_chat_model": False})


def said(answer: object) -> None:
    assert answer


check("chat", lambda: said(llm.chat([ChatMessage(role="user", content=TEXT)]).message.content))
check("chat, streamed", lambda: said(list(llm.stream_complete(TEXT))[-1].text))
check("completion", lambda: said(plain.complete(TEXT).text))
end()
