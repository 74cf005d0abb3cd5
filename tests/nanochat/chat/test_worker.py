"""Workers with a process: engines or processes that fail or hang, which of them a request goes to, and a client that goes."""

import gc
import json
import os
import signal
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

from nanochat.chat import app
from nanochat.chat.engine_process import MakeEngine
from nanochat.chat.worker import MOST_DEATHS
from nanochat.inference.engine import Engine
from tests.nanochat.chat.serving import Says, load, serving

HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
COMPLETIONS = "/v1/chat/completions"


class Fails(Engine):
    """An engine that fails when it is asked for 7 tokens."""

    def step(self) -> None:
        if any(row.room == 7 for row in self.waiting):
            raise RuntimeError("broken")
        super().step()


class Cycle(Fails):
    """An engine that cannot be made while an earlier one exists, although its exception is in a cycle with its frame. go: a file
    that the second one waits for."""

    made: ClassVar[list[weakref.ref]] = []

    def __init__(self, *given, go: Path):
        gc.disable()
        assert [earlier() for earlier in self.made] == [None] * len(self.made)
        while self.made and not go.exists():
            time.sleep(0.01)
        super().__init__(*given)
        self.made.append(weakref.ref(self))

    def step(self) -> None:
        try:
            super().step()
        except RuntimeError as error:
            kept = error
            raise kept


def test_the_old_engine_is_free_before_the_new_one_is_made(world, tmp_path):
    """Meanwhile no request is taken."""
    with serving(world, Cycle, go=tmp_path / "go") as server:
        assert server.request(COMPLETIONS, HELLO | {"max_tokens": 7})[1]["error"]["message"] == "broken"
        assert server.request(COMPLETIONS, HELLO)[0] == 503 and server.request("/health")[0] == 200
        assert server.request("/stats")[1]["workers"][0]["cache_tokens"] == 0
        (tmp_path / "go").touch()
        server.wait_until(lambda: server.request(COMPLETIONS, HELLO)[0] == 200)
        [worker] = server.service.workers
        assert worker.errors == 1 and worker.restarts == 0


def test_a_process_that_dies_is_started_again(world):
    """Its requests get an error, and others go to the other worker."""
    with serving(world, Says, "x " * 500, delay=0.05, workers=2) as server, ThreadPoolExecutor(2) as pool:
        talks = [pool.submit(server.chat, "hi", max_tokens=30) for _ in range(2)]
        first, second = server.service.workers
        server.wait_until(lambda: first.tokens and second.tokens)
        os.kill(first.process.pid, signal.SIGKILL)
        ends = [talk.result()[-1] for talk in talks]
        assert ends.count({"finish": "length"}) == 1
        assert ["its worker has died" in str(end.get("error")) for end in ends].count(True) == 1
        assert server.request(COMPLETIONS, HELLO)[0] == 200
        server.wait_until(lambda: server.request("/health") == (200, {"status": "ok"}))
        assert [worker["restarts"] for worker in server.request("/stats")[1]["workers"]] == [1, 0]
        before = first.requests
        assert server.request(COMPLETIONS, HELLO)[0] == 200 and first.requests == before + 1


def test_a_process_that_hangs_is_told(world, monkeypatch):
    """One that has nothing to do is not taken for one."""
    monkeypatch.setattr("nanochat.chat.worker.SILENCE", 2.0)
    with serving(world, Says, "x " * 500, delay=0.01) as server, ThreadPoolExecutor(1) as pool:
        [worker] = server.service.workers
        time.sleep(2.1)
        talk = pool.submit(server.chat, "hi", max_tokens=60)
        server.wait_until(lambda: worker.tokens)
        assert server.request("/health") == (200, {"status": "ok"})
        os.kill(worker.process.pid, signal.SIGSTOP)
        server.wait_until(lambda: server.request("/health") == (503, {"status": "a worker does not answer"}))
        os.kill(worker.process.pid, signal.SIGCONT)
        assert talk.result()[-1] == {"finish": "length"}
        time.sleep(2.1)
        assert server.request("/health") == (200, {"status": "ok"}) and not worker.asked


def test_a_process_that_hangs_is_told_though_its_clients_leave_and_others_come(world, monkeypatch):
    monkeypatch.setattr("nanochat.chat.worker.SILENCE", 2.0)
    with serving(world, Says, "x " * 500, delay=0.01, workers=2) as server:
        worker, other = server.service.workers
        os.kill(worker.process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while server.request("/health")[0] == 200:
            assert time.monotonic() < deadline
            body = json.dumps(HELLO | {"stream": True, "max_tokens": 40}).encode()
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(head + body)
                time.sleep(0.3)
        assert server.request("/health") == (503, {"status": "a worker does not answer"}) and not other.silent
        os.kill(worker.process.pid, signal.SIGCONT)
        server.wait_until(lambda: server.request("/health") == (200, {"status": "ok"}))


def test_an_engine_that_is_made_for_long_is_told(world, tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.chat.worker.SILENCE", 0.5)
    with serving(world, Cycle, go=tmp_path / "go") as server:
        assert server.request(COMPLETIONS, HELLO | {"max_tokens": 7})[1]["error"]["message"] == "broken"
        server.wait_until(lambda: server.request("/health") == (503, {"status": "a worker does not answer"}))
        (tmp_path / "go").touch()
        server.wait_until(lambda: server.request("/health") == (200, {"status": "ok"}))


def load_once(tokenizer: Path, kind: type[Engine], *, loaded: Path) -> MakeEngine:
    """As `load`, but the process dies when another one has loaded before; writes a line for each."""
    with loaded.open("a") as file:
        print(os.getpid(), file=file)
    if len(loaded.read_text().split()) > 1:
        os._exit(3)
    return load(tokenizer, kind)


def test_a_process_that_dies_again_and_again_is_not_started_for_ever(world, tmp_path):
    with serving(world, load=load_once, loaded=tmp_path / "loaded") as server:
        [worker] = server.service.workers
        os.kill(worker.process.pid, signal.SIGKILL)
        server.wait_until(lambda: server.request("/health")[1]["status"] == "a worker starts again" or worker.ended)
        server.wait_until(lambda: worker.ended)
        assert server.request("/health") == (503, {"status": "a worker has died"})
        status, found = server.request("/chat", HELLO)
        assert status == 503 and "every worker has died" in found["error"]["message"]
        assert len((tmp_path / "loaded").read_text().split()) == 1 + MOST_DEATHS == 1 + worker.restarts


def test_an_engine_that_cannot_be_made_again_ends_its_process(world, tmp_path):
    with serving(world, OnlyOne) as server:
        assert server.request(COMPLETIONS, HELLO | {"max_tokens": 7})[0] == 500
        [worker] = server.service.workers
        server.wait_until(lambda: worker.restarts == 1 and worker.serving)
        assert server.request(COMPLETIONS, HELLO)[0] == 200


class OnlyOne(Fails):
    """An engine of which a process makes only one."""

    made: ClassVar[list] = []

    def __init__(self, *given):
        if self.made:
            raise MemoryError("no engine")
        super().__init__(*given)
        self.made.append(1)


def test_requests_at_the_same_time_go_to_different_workers(world, monkeypatch):
    both, prompt_of = threading.Barrier(2), app.prompt_of

    def together(*given):
        found = prompt_of(*given)
        both.wait(10)
        return found

    monkeypatch.setattr(app, "prompt_of", together)
    with serving(world, Says, "x " * 9, delay=0.1, workers=2) as server, ThreadPoolExecutor(2) as pool:
        for found in [pool.submit(server.request, COMPLETIONS, HELLO) for _ in range(2)]:
            assert found.result()[0] == 200
        assert [worker.requests for worker in server.service.workers] == [1, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_the_rows_of_a_client_that_goes_are_removed(world, stream):
    """Long before their end, also when the client waits for the whole answer."""
    body = json.dumps(HELLO | {"max_tokens": 500, "n": 2, "stream": stream}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with serving(world, Says, "x " * 500, delay=0.05) as server:
        [worker] = server.service.workers
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + body)
            server.wait_until(lambda: worker.tokens > 2)
            assert server.open_rows == 2
        server.wait_until(lambda: server.open_rows == 0, 5)
        time.sleep(0.2)  # for a step that was under way
        tokens = worker.tokens
        time.sleep(0.3)
        assert worker.tokens == tokens < 200


def test_a_process_that_cannot_be_started_again_is_told(world, capsys):
    with serving(world) as server:
        [worker] = server.service.workers
        worker._start = lambda: os.open("/nowhere/at/all", os.O_RDONLY)
        os.kill(worker.process.pid, signal.SIGKILL)
        server.wait_until(lambda: worker.ended)
        assert server.request("/health") == (503, {"status": "a worker has died"})
    assert "it cannot be started again ([Errno 2]" in capsys.readouterr().err
