"""The real front of a cluster: Serve's proxy with ours in it, spoken to byte by byte."""

from urllib.parse import urlsplit

from longreach.cluster.app import LocalCluster

from .conftest import MODEL
from .rest.raw_http import Connection, check_the_front, post

PROMPT = {"model": MODEL, "prompt": "Well?", "max_tokens": 2, "temperature": 0}


def port_of(cluster: LocalCluster) -> int:
    port = urlsplit(cluster.url).port
    assert port is not None
    return port


def test_http_as_clients_speak_it(cluster: LocalCluster) -> None:
    check_the_front(port_of(cluster), PROMPT)


def test_a_body_over_the_limit_is_refused_before_it_is_sent(cluster: LocalCluster) -> None:
    with Connection(port_of(cluster)) as client:
        head, _, _ = post("/tokenize", {"prompt": "ab"}, "Expect: 100-continue").partition(
            b"Content-L"
        )
        client.send(head + b"Content-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n")
        answer = client.answer()
    assert (answer.status, answer.json["error"]["code"]) == (413, "body_too_large")


def test_foreign_pages_and_names_are_refused(cluster: LocalCluster) -> None:
    """On a server for this machine alone, without keys."""
    request = post("/v1/completions", PROMPT)
    for found, put in (
        (b"Host: 127.0.0.1", b"Host: evil.example:8000"),
        (b"Host: 127.0.0.1", b"Host: 127.0.0.1\r\nOrigin: http://evil.example"),
    ):
        with Connection(port_of(cluster)) as client:
            client.send(request.replace(found, put))
            assert client.answer().status == 403
    with Connection(port_of(cluster)) as client:
        client.send(request.replace(b"application/json", b"text/plain"))
        assert client.answer().status == 415
