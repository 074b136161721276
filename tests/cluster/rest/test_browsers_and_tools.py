"""What browsers and tools want beside answers: descriptions, compressed bodies, HEAD."""

import codecs
import gzip
import json
import zlib
from functools import partial
from pathlib import Path

import jsonschema
import pytest

from longreach.cluster.rest import Access

from .backend import LIMITS, MODEL, Endpoint

BODY = json.dumps({"model": MODEL, "prompt": "Well?"}).encode()
# Without the time in it, which would be part of a test's name: all processes name tests alike.
pack = partial(gzip.compress, mtime=0)


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", pack(BODY)),
        ("GZIP", pack(BODY)),
        ("x-gzip", pack(BODY)),
        ("deflate", zlib.compress(BODY)),
        ("identity", BODY),
        ("", BODY),
        ("", codecs.BOM_UTF8 + BODY),
        ("gzip", pack(codecs.BOM_UTF8 + BODY)),
    ],
)
def test_bodies_may_be_packed_and_marked(endpoint: Endpoint, encoding: str, packed: bytes) -> None:
    headers = {"content-encoding": encoding}
    answer = endpoint.request("POST", "/v1/completions", content=packed, headers=headers)
    assert answer.status_code == 200, answer.text
    assert bytes(endpoint.backend.requests[0].prompt.tolist()) == b"Well?"


@pytest.mark.parametrize(
    ("encoding", "packed", "status", "code"),
    [
        ("br", BODY, 415, "unsupported_content_encoding"),
        ("gzip, gzip", BODY, 415, "unsupported_content_encoding"),
        ("gzip", BODY, 400, "invalid_content_encoding"),
        ("gzip", b"", 400, "invalid_content_encoding"),
        ("gzip", pack(BODY)[:-1], 400, "invalid_content_encoding"),
        ("gzip", pack(BODY) + b"x", 400, "invalid_content_encoding"),
        ("gzip", pack(BODY) * 2, 400, "invalid_content_encoding"),
        ("deflate", pack(BODY), 400, "invalid_content_encoding"),
        ("gzip", pack(b" " * LIMITS.max_body_bytes + BODY), 413, "body_too_large"),
        ("gzip", pack(bytes(1 << 21)), 413, "body_too_large"),
    ],
)
def test_what_cannot_be_unpacked_or_becomes_too_large(
    endpoint: Endpoint, encoding: str, packed: bytes, status: int, code: str
) -> None:
    headers = {"content-encoding": encoding}
    assert len(packed) <= LIMITS.max_body_bytes
    answer = endpoint.request("POST", "/v1/completions", content=packed, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert ("accept-encoding" in answer.headers) == (status == 415)
    assert not endpoint.backend.requests


def test_a_packed_body_may_come_in_any_pieces(endpoint: Endpoint) -> None:
    packed = pack(BODY)

    async def byte_by_byte():
        for index in range(len(packed)):
            yield packed[index : index + 1]

    headers = {"content-encoding": "gzip"}
    answer = endpoint.request("POST", "/v1/completions", content=byte_by_byte(), headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/health", "/ready", "/version", "/metrics", "/openapi.json", "/docs", "/v1/models",
        f"/v1/models/{MODEL}",
    ],
)  # fmt: skip
def test_whatever_can_be_got_has_a_head(endpoint: Endpoint, path: str) -> None:
    assert endpoint.request("GET", path).status_code == 200
    assert endpoint.request("HEAD", path).status_code == 200


def test_the_description_is_open_and_names_what_is_accepted(tmp_path: Path) -> None:
    guarded = Endpoint(tmp_path, Access(api_keys=("key",)))
    page = guarded.request("GET", "/openapi.json").json()
    assert page["openapi"].startswith("3.1")
    assert set(page["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize",
        "/v1/models",
        "/v1/models/{name}", "/tokenizer_info", "/health", "/ready", "/version",
    }  # fmt: skip
    for schema in page["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    chat = page["components"]["schemas"]["ChatBody"]
    assert chat["additionalProperties"] == {"type": "null"}
    assert chat["properties"]["model"]["anyOf"][0]["enum"] == [MODEL]
    assert chat["properties"]["n"]["anyOf"][0]["maximum"] == LIMITS.max_choices
    assert page["security"] == [{"key": []}]
    assert "openapi.json" in guarded.request("GET", "/docs").text
    assert guarded.request("GET", "/v1/models").status_code == 401


def test_headers_of_ours_may_be_read_by_pages(tmp_path: Path) -> None:
    guarded = Endpoint(tmp_path, Access(origins=("https://friend.example",)))
    answer = guarded.request("GET", "/health", headers={"origin": "https://friend.example"})
    exposed = answer.headers["access-control-expose-headers"]
    assert {"x-request-id", "retry-after", "x-longreach-max-tokens"} <= set(exposed.split(", "))
