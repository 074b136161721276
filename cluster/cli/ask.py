"""`longreach ask`: a question about documents, or a conversation over them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from rich.console import Console

from ...engine.errors import InvalidRequestError
from ..client import Answer, Endpoint, EndpointError, Message
from .console import watch_prefill
from .documents import Documents

_MOST_NAMED = 5


@dataclass(frozen=True)
class Asking:
    """Of whom to ask, and how."""

    endpoint: Endpoint
    model: str
    max_model_len: int | None
    max_tokens: int
    as_json: bool


def say_what_is_asked_about(documents: Documents, console: Console) -> None:
    """How many there are, and what of a folder was left out."""
    count = len(documents.documents)
    if count > 1:
        console.print(f"{count} files", highlight=False)
    left_out = documents.left_out
    for each in left_out[:_MOST_NAMED]:
        console.print(f"left out: {each.name} {each.why}", highlight=False)
    if len(left_out) > _MOST_NAMED:
        console.print(f"left out: {len(left_out) - _MOST_NAMED} more", highlight=False)


def ask_once(asking: Asking, documents: Documents, question: str, console: Console) -> None:
    """Ask one question, and show the answer.

    Raises:
        InvalidRequestError: documents and question are longer than the model's context.
        EndpointError: with what the endpoint said.
    """
    _ask(asking, documents, [_first_message(documents, question)], question, console)


def converse(
    asking: Asking, documents: Documents, questions: Iterator[str], console: Console
) -> None:
    """Ask one question after the other; each goes with the documents and all that was said.

    An answer that fails is told, and the conversation goes on without its question.
    """
    said: list[Message] = []
    for question in questions:
        if not question.strip():
            continue
        message = {"role": "user", "content": question} if said else None
        asked = [*said, message or _first_message(documents, question)]
        try:
            answer = _ask(asking, documents, asked, question, console)
        except (EndpointError, InvalidRequestError) as error:
            console.print(f"[red]{error}[/red]", highlight=False)
            continue
        said = [*asked, {"role": "assistant", "content": answer.text}]


def questions_from(read_line: Callable[[], str]) -> Iterator[str]:
    """Lines until there are no more."""
    while True:
        try:
            yield read_line()
        except EOFError:
            return


def _first_message(documents: Documents, question: str) -> Message:
    return {"role": "user", "content": f"{documents.text}\n\n{question}"}


def _ask(
    asking: Asking, documents: Documents, messages: list[Message], question: str, console: Console
) -> Answer:
    _count(asking, messages, console)
    with watch_prefill(console) as watch:

        def on_text(text: str) -> None:
            watch.close()
            if not asking.as_json:
                print(text, end="", flush=True)

        answer = asking.endpoint.ask(
            asking.model, messages, asking.max_tokens, watch.update, on_text
        )
    print(_as_json(asking, documents, question, answer) if asking.as_json else "", flush=True)
    console.print(
        f"{answer.prompt_tokens:,} prompt tokens, first token after {answer.first_token:.2f} s, "
        f"{answer.completion_tokens:,} tokens in {answer.finished:.2f} s"
    )
    return answer


def _count(asking: Asking, messages: list[Message], console: Console) -> None:
    """Say how long the prompt is before it is sent.

    Raises:
        InvalidRequestError: it leaves no room for an answer.
    """
    tokens = asking.endpoint.count_tokens(asking.model, messages)
    longest = asking.max_model_len
    of_how_many = "" if longest is None else f" of {longest:,}"
    console.print(f"asking about {tokens:,}{of_how_many} tokens")
    if longest is not None and tokens >= longest:
        raise InvalidRequestError(
            f"the prompt has {tokens:,} tokens, and {asking.model} takes fewer than {longest:,}; "
            "name fewer files, or a part of the folder"
        )


def _as_json(asking: Asking, documents: Documents, question: str, answer: Answer) -> str:
    """One line."""
    said = {
        "model": asking.model,
        "documents": [each.name for each in documents.documents],
        "left_out": [asdict(each) for each in documents.left_out],
        "question": question,
        **asdict(answer),
    }
    return json.dumps(said, ensure_ascii=False)
