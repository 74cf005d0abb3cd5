"""The server of `nanochat web`: what requests may be, many of them at once, clients that misbehave, and errors."""

import asyncio
import json
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat.chat import app, connections
from nanochat.chat.requests import ChatRequest, RequestError, prompt_of
from nanochat.inference.engine import PAGE, Engine
from nanochat.tokenizer.chat_format import render_prompt
from tests.nanochat.chat.serving import Says, serving, words


class Tidy(Engine):
    """An engine that fails if something is left of rows when no row is left."""

    def _settle(self) -> None:
        super()._settle()
        assert self.busy or not (self.cache.pages.users or self.reserved)


@pytest.fixture(scope="module")
def server(world):
    with serving(world, Tidy, workers=2, frozen=True) as server:
        yield server


def messages(*texts: str, system: str = "") -> list[dict]:
    roles = ("user", "assistant")
    found = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + found


def text_of(events: list[dict]) -> str:
    return "".join(event.get("text", "") for event in events)


BAD = {
    "not JSON": (b"{", "EOF"),
    "no body": (b"", "EOF"),
    "a list": (b"[]", "should be an object"),
    "half a character": ('{"messages":[{"role":"user","content":"né"}]}'.encode()[:-5] + b'"}]}', "Invalid JSON"),
    "UTF-16": (json.dumps({"messages": messages("hi")}).encode("utf-16"), "Invalid JSON"),
    "a lone surrogate": (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "Invalid JSON"),
    "no messages": ({}, "messages: Field required"),
    "an empty list": ({"messages": []}, "messages: List should have at least 1 item"),
    "501 messages": ({"messages": messages(*["a"] * 501)}, "at most 500"),
    "a role": ({"messages": [{"role": "robot", "content": "a"}]}, "'robot'"),
    "a number as content": ({"messages": [{"role": "user", "content": 3}]}, "got 3"),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
    "8,001 characters": ({"messages": messages("x" * 8001)}, "message 0 has 8,001 characters; there may be 8,000"),
    "32,001 together": ({"messages": messages(*["x" * 8000] * 4, "y")}, "32,001 characters together; there may be 32,000"),
    "the assistant last": ({"messages": messages("a", "b")}, "must be from the user, got one from the assistant"),
    "the user twice": ({"messages": [*messages("a"), *messages("b")]}, "wanted 'assistant' in turn"),
    "a system message alone": ({"messages": messages(system="s")}, "from the system"),
    "a number as temperature": ({"messages": messages("a"), "temperature": "hot"}, "temperature: Input should be a valid number"),
    "temperature 2.1": ({"messages": messages("a"), "temperature": 2.1}, "less than or equal to 2"),
    "temperature NaN": (b'{"messages":[{"role":"user","content":"a"}],"temperature":NaN}', "finite number"),
    "temperature true": ({"messages": messages("a"), "temperature": True}, "valid number"),
    "top_k 0": ({"messages": messages("a"), "top_k": 0}, "greater than or equal to 1"),
    "top_k 201": ({"messages": messages("a"), "top_k": 201}, "less than or equal to 200"),
    "top_k 1.5": ({"messages": messages("a"), "top_k": 1.5}, "integer"),
    "no tokens": ({"messages": messages("a"), "max_tokens": 0}, "greater than or equal to 1"),
    "4,097 tokens": ({"messages": messages("a"), "max_tokens": 4097}, "less than or equal to 4096"),
    "a field of another name": ({"messages": messages("a"), "temprature": 1}, "temprature: Extra inputs are not permitted"),
    "too long for the model": ({"messages": messages("\n" * 1400)}, "leaves none of the model's 640 positions"),
    "a number of 5,000 digits": (b'{"messages":[{"role":"user","content":"a"}],"seed":1' + b"0" * 5000 + b"}", "number out of range"),
    "lists in lists": (b"[" * 100_000, "Invalid JSON"),
    "more than a mebibyte": (b" " * (1 << 20) + b"{}", "more than 1,048,576 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("path", ["/chat", "/v1/chat/completions"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_400_and_the_reason(server, path, name):
    body, reason = BAD[name]
    status, found = server.request(path, **({"raw": body} if isinstance(body, bytes) else {"body": body}))
    assert status == 400 and reason in found["error"]["message"], found


def test_the_limits_themselves_are_allowed(server):
    body = {"temperature": 2, "top_k": 200, "max_tokens": 4096, "seed": 2**64 - 1}
    events = server.chat("hi", **body)
    assert events[-1]["finish"] in ("stop", "length") and text_of(events)
    for talk in (messages(*["x"] * 499), messages("a", "x" * 31_998, "b")):  # what a model wrote may be long
        status, found = server.request("/v1/chat/completions", {"messages": talk, "max_tokens": 1})
        assert status == 200 and found["choices"][0]["finish_reason"] in ("length", "stop")


def test_other_addresses_and_methods(server):
    assert server.request("/nothing")[0] == 404 and server.request("/chat")[0] == 405
    assert server.request("/health") == (200, {"status": "ok"})
    server.chat("hi", max_tokens=1)
    status, stats = server.request("/stats")
    caches = [worker["cache_tokens"] for worker in stats["workers"]]
    assert any(caches) and not any(tokens % PAGE["cpu"] for tokens in caches)
    assert status == 200 and len(stats["workers"]) == 2 and stats["defaults"]["top_k"] == 50


class SaysWhether(Says):
    """A model that says whether the prompt has two characters."""

    def answer(self, prompt: str) -> list[int]:
        return words(self.tokenizer, f"é{'네 ✓' in prompt}✓")


def test_a_character_that_arrives_in_two_parts(world):
    """Of the request, and of the answer, whose tokens may be parts of a character."""
    body = json.dumps({"messages": messages("네 ✓")}, ensure_ascii=False).encode()
    cut = body.index("✓".encode()) + 1
    head = f"POST /chat HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    with (
        serving(world, SaysWhether) as server,
        socket.create_connection(("127.0.0.1", server.port)) as connection,
    ):
        for part in (head, body[:cut], body[cut:]):
            connection.sendall(part)
            time.sleep(0.05)
        answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    assert text_of([json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: ")]) == "éTrue✓"


def test_the_oldest_turns_are_forgotten_and_the_system_message_is_not(world, tokenizer):
    """As few as possible, by the positions of the model."""
    talk = messages(*[f"{number}" * 150 for number in range(9)], system="Rules.")
    request = ChatRequest.model_validate({"messages": talk})
    whole, none = prompt_of(tokenizer, request, 10_000, 64)
    assert none == 0 and whole == render_prompt(tokenizer, {"messages": talk})
    for positions in (200, 400, 600):
        prompt, forgotten = prompt_of(tokenizer, request, positions, 64)
        most = positions - min(64, positions // 4)
        longer = render_prompt(tokenizer, {"messages": [talk[0], *talk[1 + 2 * (forgotten - 1) :]]})
        assert forgotten and "Rules." in tokenizer.decode(prompt) and len(longer) > most
        assert len(prompt) <= most or forgotten == 4, (positions, forgotten)
    with serving(world) as server:
        _, found = server.request("/v1/chat/completions", {"messages": talk, "max_tokens": 300})
        assert found["usage"]["prompt_tokens"] <= 640 - 160


def test_a_call_in_a_message_is_a_call_again(tokenizer):
    """As the page sends it, and as text in the form that OpenAI's API gave it, if the calculator agrees."""
    call = [
        {"type": "text", "text": "It is"},
        {"type": "python", "text": "2+3"},
        {"type": "python_output", "text": "5"},
    ]
    wanted = render_prompt(
        tokenizer, {"messages": [*messages("a"), {"role": "assistant", "content": call}, *messages("b")]}
    )
    for content in (call, "It is [2+3 → 5] "):
        talk = [*messages("a"), {"role": "assistant", "content": content}, *messages("b")]
        assert prompt_of(tokenizer, ChatRequest.model_validate({"messages": talk}), 640, 9)[0] == wanted
    wrong = messages("a", "It is [2+3 → 6] ", "b")
    assert prompt_of(tokenizer, ChatRequest.model_validate({"messages": wrong}), 640, 9)[0] == render_prompt(
        tokenizer, {"messages": wrong}
    )
    with pytest.raises(RequestError, match="malformed conversation"):
        prompt_of(
            tokenizer, ChatRequest.model_validate({"messages": messages("a", "b") * 2 + messages("c") * 2}), 640, 9
        )


def resident(*processes: int) -> int:
    """Bytes of memory of this process and others."""
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in ("self", *processes)]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


async def misbehave(port: int, kind: int) -> None:
    """A client that goes in the middle of its answer, or of its request, or reads slowly."""
    body = json.dumps({"messages": messages("hello"), "max_tokens": 200}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=64)
    writer.write(f"POST /chat HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode())
    writer.write(body if kind % 3 else body[:-4])
    await writer.drain()
    for _ in range(40 if kind % 3 == 1 else 3 * (kind % 3 > 0)):
        await reader.read(40)
        await asyncio.sleep(0.01)
    writer.transport.abort() if kind % 2 else writer.close()


def test_64_chats_with_clients_that_misbehave(server):
    """Each gets what it gets alone; nothing is left of the others, and no memory is lost."""

    def ask(number: int) -> str:
        events = server.chat(f"question {number}", seed=number, temperature=0.9, max_tokens=24)
        assert events[-1]["finish"] in ("stop", "length")
        return text_of(events)

    def idle() -> bool:
        return all(w["running"] == w["waiting"] == 0 for w in server.request("/stats")[1]["workers"])

    async def disturb() -> None:
        await asyncio.gather(*[misbehave(server.port, number) for number in range(48)])

    alone = {number: ask(number) for number in (0, 31, 63)}
    used = []
    for _ in range(3):
        disturbance = threading.Thread(target=lambda: asyncio.run(disturb()))
        disturbance.start()
        with ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(ask, range(64)))
        disturbance.join()
        assert all(answers[number] == text for number, text in alone.items())
        server.wait_until(idle)
        used.append(resident(*(worker.process.pid for worker in server.service.workers)))
    assert used[2] - used[1] < 16 << 20, used
    for worker in server.service.workers:
        assert worker.alive and worker.errors == 0 and not worker.jobs


def test_a_reader_that_takes_nothing_is_dropped(world, monkeypatch):
    monkeypatch.setattr(connections, "SLOWEST_READER", 0.3)
    monkeypatch.setattr(
        app, "json", type("Large", (), {"dumps": staticmethod(lambda item: json.dumps(item) + " " * 200_000)})
    )
    with serving(world, Says, "x " * 300) as server:
        body = json.dumps({"messages": messages("hello")}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            [worker] = server.service.workers
            server.wait_until(lambda: worker.requests == 1)
            server.wait_until(lambda: server.open_rows == 0)
            assert server.request("/health")[0] == 200
            connection.settimeout(10)
            with pytest.raises(ConnectionError):  # the server has given up
                for _ in range(200):
                    if not connection.recv(1 << 20):
                        raise ConnectionError


def test_a_reader_that_takes_nothing_for_a_while_gets_its_answer(world, monkeypatch):
    """The time that it may take nothing ends when it takes something, though its answer takes longer than that."""
    monkeypatch.setattr(connections, "SLOWEST_READER", 1.0)
    monkeypatch.setattr(
        app, "json", type("Large", (), {"dumps": staticmethod(lambda item: json.dumps(item) + " " * 200_000)})
    )
    with serving(world, Says, "x " * 200, delay=0.01) as server:
        body = json.dumps({"messages": messages("hello")}).encode()
        head = f"POST /chat HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + body)
            time.sleep(0.7)
            started, end = time.monotonic(), b""
            while part := connection.recv(1 << 20):
                end = (end + part)[-300_000:]
        assert time.monotonic() - started > 0.6 and b'"finish"' in end


def test_an_error_of_the_server_is_not_taken_for_a_client_that_goes(tokenizer, monkeypatch, tmp_path):
    """A file that cannot be read is an OSError too. The client gets 500 without the file's name, and the server's log the error."""
    monkeypatch.setattr(app, "PAGE", tmp_path / "page.html")
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": [(b"host", b"x")]}
    sent = []

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    with pytest.raises(FileNotFoundError):
        asyncio.run(app.create_app(app.Service([], tokenizer, "tiny"))(scope, receive, send))
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"]["message"] == "the server failed; its log says why"


def test_too_many_at_once_get_429(world):
    """With one place and room for one more to wait; the place is free again when its client goes."""

    options = {"delay": 0.01, "rows": 1}
    with serving(world, Says, "x " * 200, most_waiting=1, **options) as server, ThreadPoolExecutor(2) as pool:
        talks = [pool.submit(server.chat, "hi", max_tokens=100) for _ in range(2)]
        server.wait_until(lambda: server.open_rows == 2)
        status, found = server.request("/chat", {"messages": messages("hi")})
        assert status == 429 and "try again later" in found["error"]["message"]
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(server.url + "/chat", json.dumps({"messages": messages("hi")}).encode())
        assert refused.value.code == 429 and int(refused.value.headers["Retry-After"]) > 0
        assert server.request("/v1/chat/completions", {"messages": messages("hi"), "n": 2})[0] == 429
        status, found = server.request("/v1/chat/completions", {"messages": messages("hi"), "n": 3})
        assert status == 400 and found["error"]["param"] == "n" and "n is 3" in found["error"]["message"]
        assert all(talk.result()[-1] == {"finish": "length"} for talk in talks)
        assert server.chat("hi", max_tokens=2)[-1] == {"finish": "length"}
        server.service.ending = True
        assert server.request("/chat", {"messages": messages("hi")})[0] == 503 and server.request("/health")[0] == 503


def asked_again(server, body: dict) -> tuple[int, dict]:
    """The answer of the first completion that does not come while the engine starts again."""
    deadline = time.monotonic() + 15
    while (answer := server.request("/v1/chat/completions", body))[0] == 503:
        assert time.monotonic() < deadline, answer
        time.sleep(0.02)
    return answer


class FailsLate(Engine):
    """An engine that fails at the 41st token of a row. errors: the file that is its process's stderr."""

    def __init__(self, *given, errors: Path):
        super().__init__(*given)
        self.stops = set()  # no answer ends before its time
        sys.stderr = errors.open("a")

    def step(self) -> None:
        if any(row.length > 40 for row in self.running):
            raise RuntimeError("broken")
        super().step()


def test_an_error_of_the_engine_ends_its_answers_and_nothing_else(world, tmp_path):
    with serving(world, FailsLate, errors=tmp_path / "errors") as server:
        events = server.chat("\n" * 60, max_tokens=60)
        assert events[-1]["error"]["message"] == "the answer broke off: broken"
        status, found = asked_again(server, {"messages": messages("\n" * 60), "max_tokens": 60})
        assert status == 500 and found["error"]["message"] == "broken"
        status, found = asked_again(server, {"messages": messages("hi"), "max_tokens": 3})
        assert status == 200 and found["choices"][0]["finish_reason"] == "length"
        assert server.request("/stats")[1]["workers"][0]["errors"] == 2 and server.request("/health")[0] == 200
    assert (tmp_path / "errors").read_text().count("RuntimeError: broken") == 2
