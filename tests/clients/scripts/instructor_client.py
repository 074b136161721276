"""instructor, by tools and by schemas."""

import instructor
import openai
from checks import BASE_URL, MODEL, TEXT, check, end
from pydantic import BaseModel, Field


class City(BaseModel):
    name: str = Field(max_length=8)


def asked(mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=BASE_URL, api_key="none"), mode=mode)
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": TEXT}], response_model=City,
        max_tokens=200, max_retries=0,
    )  # fmt: skip
    assert isinstance(answer, City)


check("tools", lambda: asked(instructor.Mode.TOOLS))
check("json_schema", lambda: asked(instructor.Mode.JSON_SCHEMA))
end()
