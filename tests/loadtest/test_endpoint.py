"""What an endpoint says of itself."""

import pytest

from longreach.loadtest.endpoint import Endpoint

from .endpoint import CHARACTERS_PER_TOKEN, MODEL, TEMPLATE_TOKENS, Script


def test_model_and_length_are_asked_for(script: Script, port: int) -> None:
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1/")
    assert endpoint.url == f"http://127.0.0.1:{port}"
    assert endpoint.model == MODEL
    assert endpoint.max_model_len() is None, "it does not say"
    script.max_model_len = 4096
    assert endpoint.max_model_len() == 4096
    assert Endpoint(endpoint.url, "another").model == "another"


def test_text_is_counted_by_usage(port: int) -> None:
    size = Endpoint(f"http://127.0.0.1:{port}").text_size()
    assert size.characters_per_token == pytest.approx(CHARACTERS_PER_TOKEN, rel=0.01)
    assert size.template_tokens == pytest.approx(TEMPLATE_TOKENS, abs=3)
    assert size.characters(1_000) == pytest.approx(CHARACTERS_PER_TOKEN * 990, rel=0.01)
