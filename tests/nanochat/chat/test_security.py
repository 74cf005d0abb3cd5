"""What the server does not do for strangers: pages of other sites, and clients that are slow on purpose."""

import json
import socket
import urllib.error
import urllib.request

import pytest

from nanochat.chat import requests
from nanochat.chat.web import hosts_of
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.engine import Engine
from tests.nanochat.chat.serving import serving
from tests.nanochat.models import perturbed

HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
COMPLETIONS = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    return perturbed(GPTConfig(2, 64, 4, 2, tokenizer.vocab_size, 64))


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with serving(lambda: Engine(model, tokenizer), hosts=hosts_of("127.0.0.1", "127.0.0.1")) as server:
        yield server


@pytest.mark.parametrize(
    ("host", "status"),
    {"localhost": 200, "LocalHost:8000": 200, "127.0.0.1": 200, "[::1]:80": 200, "evil.example": 403, "[": 403}.items(),
)
def test_a_name_that_another_site_gave_this_machine_is_refused(server, host, status):
    for path, body in ((COMPLETIONS, HELLO), ("/stats", None)):
        found, answer = server.request(path, body, Host=host)
        assert found == status
        assert status == 200 or f"the host of the request is '{host}'; wanted one of" in answer["error"]["message"]


def test_any_name_may_be_used_when_other_machines_can_connect(model, tokenizer):
    assert hosts_of("0.0.0.0", "0.0.0.0") is None and hosts_of("10.0.0.7", "gpu7") is None
    assert hosts_of("::1", "ip6-localhost") == {"localhost", "127.0.0.1", "::1", "ip6-localhost"}
    with serving(lambda: Engine(model, tokenizer)) as server:
        assert server.request("/stats", Host="gpu7.cluster:8000")[0] == 200


def test_a_page_of_another_site_is_refused(server):
    own, other = f"http://127.0.0.1:{server.port}", "http://evil.example"
    for headers, status in (
        ({"Origin": own}, 200),
        ({"Origin": own, "Sec_Fetch_Site": "same-origin"}, 200),
        ({"Origin": "https://chat.example", "Sec_Fetch_Site": "same-origin"}, 200),  # behind a proxy
        ({"Origin": other}, 403),
        ({"Origin": other, "Sec_Fetch_Site": "cross-site"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
    ):
        found, answer = server.request(COMPLETIONS, HELLO, **headers)
        assert found == status, headers
        assert status == 200 or f"from a page of '{headers['Origin']}'" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/chat", COMPLETIONS])
def test_a_body_that_does_not_arrive_gets_408(server, monkeypatch, path):
    monkeypatch.setattr(requests, "SLOWEST_BODY", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive in 0.2 seconds" in answer
    assert server.request(path, HELLO | {"temperature": 3})[0] == 400


def test_the_page_may_load_nothing_and_be_in_no_frame(server):
    with urllib.request.urlopen(server.url) as response:
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy


def test_who_may_try_again_is_told_when(model, tokenizer):
    with serving(lambda: Engine(model, tokenizer)) as server:
        server.service.ending = True
        with pytest.raises(urllib.error.HTTPError) as found:
            urllib.request.urlopen(server.url + COMPLETIONS, json.dumps(HELLO).encode())
        assert found.value.code == 503 and int(found.value.headers["Retry-After"]) > 0
