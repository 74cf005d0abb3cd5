"""What the server does not do for strangers: pages of other sites, and clients that are slow on purpose."""

import contextlib
import json
import resource
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanochat.chat import connections, requests
from nanochat.chat.web import hosts_of
from nanochat.platform.errors import UserError
from tests.conftest import command, environment
from tests.nanochat.chat.serving import Says, serving

HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
COMPLETIONS = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(world):
    with serving(world, hosts=hosts_of("127.0.0.1", "127.0.0.1")) as server:
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


def test_any_name_may_be_used_when_other_machines_can_connect(world):
    assert hosts_of("0.0.0.0", "0.0.0.0") is None and hosts_of("10.0.0.7", "gpu7") is None
    assert hosts_of("::1", "ip6-localhost") == {"localhost", "127.0.0.1", "::1", "ip6-localhost"}
    with serving(world) as server:
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


def waits_for_the_end(connection: socket.socket, *, sends: bytes = b"") -> float:
    """Send a byte again and again until the server closes the connection; returns after how many seconds it did."""
    started = time.monotonic()
    connection.settimeout(0.05)
    while time.monotonic() - started < 10:
        try:
            connection.sendall(sends)
            if not connection.recv(4096):
                return time.monotonic() - started
        except TimeoutError:
            continue
        except ConnectionError:
            return time.monotonic() - started
    raise AssertionError("the connection stays open")


def test_a_connection_whose_header_does_not_arrive_is_closed(world, monkeypatch):
    """Also one that had a request before, and one that sends its header byte by byte; and none whose answer takes longer."""
    monkeypatch.setattr(connections, "SLOWEST_HEADER", 0.4)
    with serving(world, Says, "x " * 40, delay=0.05) as server:
        assert server.chat("hi", max_tokens=30)[-1] == {"finish": "length"}  # takes 1.5 s
        for first, sends in ((b"", b""), (b"GET / HTTP/1.1\r\nA: ", b"a"), (None, b"a")):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                if first is None:
                    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert connection.recv(4096).startswith(b"HTTP/1.1 200")
                    first = b"GET / HTTP/1.1\r\nA: "
                connection.sendall(first)
                assert 0.2 < waits_for_the_end(connection, sends=sends) < 5


def test_idle_connections_give_way_to_others(world):
    """The one that is idle for the longest time first; a request beyond the limit gets 503 when none is idle."""
    with serving(
        world, Says, "x " * 400, delay=0.02, connections=3
    ) as server, contextlib.ExitStack() as opened, ThreadPoolExecutor(3) as pool:  # fmt: skip
        idle = [opened.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(3)]
        assert server.request("/health")[0] == 200
        assert idle[0].recv(1) == b"" and waits_for_the_end(idle[0]) < 5
        idle[2].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle[2].recv(4096).startswith(b"HTTP/1.1 200")
        talks = [pool.submit(server.chat, "hi", max_tokens=300) for _ in range(3)]
        [worker] = server.service.workers
        deadline = time.monotonic() + 10
        while worker.requests < 3:  # without a connection of our own
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(urllib.error.HTTPError) as found:
            urllib.request.urlopen(server.url + COMPLETIONS, json.dumps(HELLO).encode())
        assert found.value.code == 503 and int(found.value.headers["Retry-After"]) > 0
        error = json.loads(found.value.read())["error"]
        assert error["type"] == "server_error" and "try again later" in error["message"]
        assert all(talk.result()[-1] == {"finish": "length"} for talk in talks)
        assert server.request("/health")[0] == 200


@pytest.mark.parametrize(("soft", "hard"), [(128, 256), (256, 256)])
def test_more_connections_than_files_may_be_open(trained_base, soft, hard):
    """The server raises its limit, says how many connections that allows, and is there for others; nothing floods its stderr."""
    limits = ["bash", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"', "bash"]
    process = subprocess.Popen(
        [*limits, *command("web", "--port", "0", "--device", "cpu")], env=environment(trained_base),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    note, line = process.stdout.readline(), process.stdout.readline()
    try:
        most = int(note.split()[3])
        assert f"may open {hard} files (ulimit -Hn)" in note and 96 < most < 192, note + line
        port = int(line.rpartition(" ;")[0].rpartition(":")[2])
        with contextlib.ExitStack() as opened:
            for _ in range(2):
                for _ in range(400):
                    opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
                started = time.monotonic()
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
                    assert answer.status == 200 and time.monotonic() - started < 2
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == ""


def test_a_limit_of_files_that_leaves_no_connection(monkeypatch):
    limits = []
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(connections.resource, "setrlimit", lambda _, limit: limits.append(limit))
    limits.append((50, 60))
    with pytest.raises(UserError, match="may open 60 files, and needs .* ulimit -Hn"):
        connections.most_connections()
    for limit in ((1 << 20, 1 << 20), (1024, 1 << 20), (1024, resource.RLIM_INFINITY), (resource.RLIM_INFINITY,) * 2):
        limits.append(limit)
        assert connections.most_connections() == 1024
        assert limits[-1][1] == limit[1] and (limits[-1] == limit or limit[0] < limits[-1][0] < 8192)


def test_the_page_may_load_nothing_and_be_in_no_frame(server):
    with urllib.request.urlopen(server.url) as response:
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy


def test_who_may_try_again_is_told_when(world):
    with serving(world) as server:
        server.service.ending = True
        with pytest.raises(urllib.error.HTTPError) as found:
            urllib.request.urlopen(server.url + COMPLETIONS, json.dumps(HELLO).encode())
        assert found.value.code == 503 and int(found.value.headers["Retry-After"]) > 0
