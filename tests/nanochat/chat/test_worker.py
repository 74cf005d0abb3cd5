"""Workers that die or fail, which of them a request goes to, and a client that goes."""

import asyncio
import gc
import json
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanochat.chat import app
from nanochat.chat import worker as worker_module
from nanochat.chat.worker import Job, Worker, WorkerError
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.engine import Engine
from tests.nanochat.chat.serving import Says, serving, words
from tests.nanochat.models import perturbed

HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
# the thread's own exception is what these tests cause
dies = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    return perturbed(GPTConfig(2, 64, 4, 2, tokenizer.vocab_size, 64))


class Fails(Engine):
    """An engine that fails when it is asked for 7 tokens."""

    def step(self) -> None:
        if any(row.room == 7 for row in self.waiting):
            raise RuntimeError("broken")
        super().step()


def once(make: Engine, times: int):
    """make_engine that raises after so many calls."""
    left = iter(range(times))

    def make_engine() -> Engine:
        if next(left, None) is None:
            raise MemoryError("no engine")
        return make()

    return make_engine


@dies
def test_a_dead_worker_gets_no_requests(model, tokenizer):
    with serving(once(lambda: Fails(model, tokenizer), 2), workers=2) as server:
        first, second = server.service.workers
        for worker, status in ((first, 200), (second, 503)):
            assert server.request("/v1/chat/completions", HELLO | {"max_tokens": 7})[0] == 500
            worker.join(10)
            assert not worker.is_alive() and worker.open_rows == 0
            assert [server.request("/v1/chat/completions", HELLO)[0] for _ in range(3)] == [status] * 3
            assert server.request("/health")[0] == 503
        _, found = server.request("/chat", HELLO)
        assert "every worker has died" in found["error"]["message"]


@dies
def test_requests_that_wait_in_the_inbox_get_an_error_when_the_worker_dies(model, tokenizer):
    stepping, go = threading.Event(), threading.Event()

    class Waits(Fails):
        def step(self) -> None:
            stepping.set()
            go.wait(10)
            super().step()

    async def ask() -> None:
        def submit() -> Job:
            return worker.submit([worker.engine.row([1, 2], 7)])

        jobs = [submit()]
        worker.start()
        assert await asyncio.to_thread(stepping.wait, 10)
        jobs.append(submit())
        go.set()
        for job, reason in zip(jobs, ("broken", "its worker has died"), strict=True):
            with pytest.raises(WorkerError, match=reason):
                async for _ in worker.answer(job):
                    pass
        worker.join(10)
        with pytest.raises(WorkerError, match="has ended"):
            worker.submit([])
        assert worker.open_rows == 0

    worker = Worker("worker 0", once(lambda: Waits(model, tokenizer), 1), 8)
    asyncio.run(asyncio.wait_for(ask(), 20))


def test_requests_at_the_same_time_go_to_different_workers(model, tokenizer, monkeypatch):
    both, prompt_of = threading.Barrier(2), app.prompt_of

    def together(*given):
        found = prompt_of(*given)
        both.wait(10)
        return found

    class Holds(Engine):
        def step(self) -> None:
            both.wait(10)  # no answer ends before both workers have one
            super().step()

    monkeypatch.setattr(app, "prompt_of", together)
    with serving(lambda: Holds(model, tokenizer), workers=2) as server, ThreadPoolExecutor(2) as pool:
        for found in [pool.submit(server.request, "/v1/chat/completions", HELLO | {"max_tokens": 1}) for _ in range(2)]:
            assert found.result()[0] == 200
        assert [worker.requests for worker in server.service.workers] == [1, 1]


def test_the_old_engine_is_free_before_the_new_one_is_made(model, tokenizer):
    """While the client has not taken its error, and although the exception is in a cycle with its frame."""
    made, found, making, go = [], [], threading.Event(), threading.Event()

    class Cycle(Fails):
        def step(self) -> None:
            try:
                super().step()
            except RuntimeError as error:
                kept = error
                raise kept

    def make_engine() -> Engine:
        found.append([reference() for reference in made])
        if made:
            making.set()
            go.wait(10)
        made.append(weakref.ref(engine := Cycle(model, tokenizer)))
        return engine

    gc.disable()
    try:
        with serving(make_engine) as server, ThreadPoolExecutor(1) as pool:
            failed = pool.submit(server.request, "/v1/chat/completions", HELLO | {"max_tokens": 7})
            assert making.wait(10)
            assert server.request("/v1/chat/completions", HELLO)[0] == 503 and server.request("/health")[0] == 200
            assert server.request("/stats")[1]["workers"][0]["cache_tokens"] == 0
            go.set()
            assert failed.result()[1]["error"]["message"] == "broken"
            server.wait_until(lambda: server.request("/v1/chat/completions", HELLO)[0] == 200)
    finally:
        go.set()
        gc.enable()
    assert found == [[], [None]]


@pytest.mark.parametrize("stream", [False, True])
def test_the_rows_of_a_client_that_goes_are_removed(model, tokenizer, stream):
    """Long before their end, also when the client waits for the whole answer."""
    body = json.dumps(HELLO | {"max_tokens": 500, "n": 2, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with serving(lambda: Says(model, tokenizer, lambda _: words(tokenizer, "x " * 500), delay=0.05)) as server:
        [worker] = server.service.workers
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + body)
            server.wait_until(lambda: worker.tokens > 2)
            assert worker.open_rows == 2
        server.wait_until(lambda: worker.open_rows == 0 and not worker.engine.busy, 5)
        assert worker.tokens < 200


def test_rates_are_those_of_the_last_minute(model, tokenizer, monkeypatch):
    worker = Worker("worker 0", lambda: Engine(model, tokenizer), 8)
    now = time.monotonic()
    for later in (0.0, 1.0, 100.0):
        monkeypatch.setattr(worker_module.time, "monotonic", lambda later=later: now + later)
        worker._deliver()
    assert [at for at, _ in worker.recent] == [now + 100.0]
