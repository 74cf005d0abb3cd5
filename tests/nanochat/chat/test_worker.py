"""Workers whose engines or processes fail, which of them a request goes to, what gathers for an answer, and a client that goes."""

import asyncio
import gc
import json
import multiprocessing
import os
import queue
import signal
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from nanochat.chat import app, completions, engine_process
from nanochat.chat import worker as worker_module
from nanochat.chat.engine_process import MakeEngine, Ready, Request, Step
from nanochat.chat.requests import CompletionRequest
from nanochat.chat.worker import MOST_DEATHS, Job, Overloaded, Worker, WorkerError
from nanochat.inference.engine import Engine, Token
from tests.nanochat.chat.serving import Says, load, serving, words

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


class Pipe:
    """The server's end of a pipe to nobody, which takes everything."""

    closed = False

    def __init__(self):
        self.sent = []
        self.send = self.sent.append
        self.file = open(os.devnull, "wb")
        self.fileno = self.file.fileno


class Idle(Worker):
    """A worker without a process."""

    def _start(self) -> None:
        self.pipe = Pipe()


def idle_worker() -> tuple[Worker, Pipe]:
    worker = Idle("worker 0", lambda: None, 8)
    worker._take(Ready(640, 4))
    return worker, worker.pipe


def submitted(worker: Worker, samples: int = 1) -> Job:
    return worker.submit([1, 2], samples, 9, 1.0, 50, 42, 0)


def test_when_a_worker_counts_as_silent(monkeypatch):
    """A minute after the first thing that was sent since it said something, whatever its clients do meanwhile."""
    now = 100.0
    monkeypatch.setattr(worker_module.time, "monotonic", lambda: now)

    async def ask() -> None:
        nonlocal now
        worker, _ = idle_worker()
        now += 1000
        assert not worker.silent  # it has nothing to do
        job = submitted(worker)
        for _ in range(3):  # it works for long
            now += 59
            assert not worker.silent
            worker._take(Step([(job.number, 0, [Token(1, True, None, [])], None)], 1, 640))
        now += 61
        assert worker.silent
        worker._take(Step([], 1, 640))
        assert not worker.silent
        worker._remove(worker.jobs.popitem()[0])  # the client leaves, and others come and leave
        now += 40
        worker._remove(submitted(worker).number)
        worker.jobs.clear()
        assert not worker.silent
        now += 40
        assert worker.silent

    asyncio.run(ask())


def test_a_server_that_has_ended_is_no_error_of_the_engine(capfd):
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    inbox = queue.SimpleQueue()
    inbox.put(7)  # a removal, which is answered
    cache = SimpleNamespace(pages=SimpleNamespace(count=0), page=64)
    with pytest.raises(BrokenPipeError):
        engine_process._serve(ours, inbox, "worker 0", SimpleNamespace(busy=False, cache=cache))
    assert capfd.readouterr() == ("", "")


def test_a_process_that_starts_while_the_server_ends_ends_too(monkeypatch):
    class Starts:
        def __init__(self, target, args, daemon):
            self.pipe = args[0]

        def start(self):
            worker.end()  # by another thread

        is_alive = staticmethod(lambda: False)
        join = staticmethod(lambda *_: None)

    worker, _ = idle_worker()
    worker.pipe, _ = multiprocessing.Pipe()
    monkeypatch.setattr(worker_module.PROCESSES, "Process", Starts, raising=False)
    Worker._start(worker)
    assert worker.pipe.closed and isinstance(worker.process, Starts) and not worker.alive


def test_what_comes_while_a_client_takes_nothing_is_not_lost():
    """The last tokens and the end of an answer, whose reader waits for the client meanwhile; and what came before an error."""

    async def ask(error: bool) -> list:
        worker, _ = idle_worker()
        job, got = submitted(worker), []
        token = lambda number: Token(number, True, None, [])  # noqa: E731
        worker._deliver(Step([(job.number, 0, [token(1)], None)], 1, 640))
        with pytest.raises(WorkerError) if error else nullcontext():
            async for found in worker.answer(job):
                got += found
                if len(got) == 1:
                    worker._deliver(Step([(job.number, 0, [token(2)], None if error else "stop")], 1, 640))
                    if error:
                        worker._fail("its worker has died")
        return [(tokens[0].token, finish) for _, tokens, finish in got]

    assert asyncio.run(ask(False)) == [(1, None), (2, "stop")]
    assert asyncio.run(ask(True)) == [(1, None), (2, None)]


def test_a_process_that_reads_nothing_stops_no_other(monkeypatch):
    """Its pipe fills up: requests are refused then, and removals are sent later."""

    async def ask() -> None:
        worker, _ = idle_worker()
        worker.pipe, theirs = multiprocessing.Pipe()
        worker.most_waiting = 10**6
        count = 0
        with pytest.raises(Overloaded):
            while True:
                worker.submit([7] * 2000, 1, 9, 1.0, 50, 42, 0)
                count += 1
        assert count > 3 and worker.requests == count == len(worker.jobs)
        later = []
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", lambda *call: later.append(call))
        worker._remove(0)
        assert [call[2] for call in later] == [0]
        for number in range(count):
            assert theirs.recv().job == number
        later[0][1](0)
        assert theirs.recv() == 0 and len(later) == 1

    asyncio.run(ask())


def test_a_process_that_cannot_be_started_again_is_told(world, capsys):
    with serving(world) as server:
        [worker] = server.service.workers
        worker._start = lambda: os.open("/nowhere/at/all", os.O_RDONLY)
        os.kill(worker.process.pid, signal.SIGKILL)
        server.wait_until(lambda: worker.ended)
        assert server.request("/health") == (503, {"status": "a worker has died"})
    assert "it cannot be started again ([Errno 2]" in capsys.readouterr().err


async def answers_in(tokenizer, parts: list[list[int]]) -> tuple[list[dict], list[dict]]:
    """The events of the page and the chunks of OpenAI's API, when tokens come in these parts."""
    worker, _ = idle_worker()
    jobs = [submitted(worker), submitted(worker)]
    body = CompletionRequest.model_validate(HELLO | {"logprobs": True, "stream_options": {"include_usage": True}})
    answers = [
        app.chat_events(tokenizer, worker, jobs[0], 0),
        completions.chunks(worker, jobs[1], [completions.Choice(tokenizer, ["so"])], body, {}),
    ]

    async def read(answer) -> list[dict]:
        return [event async for events in answer for event in events]

    reading = [asyncio.create_task(read(answer)) for answer in answers]
    for part in parts:
        for token in part:
            worker._deliver(Step([(job.number, 0, [Token(token, True, -1.0, [])], None) for job in jobs], 2, 640))
        await asyncio.sleep(0.001)
    worker._deliver(Step([(job.number, 0, [], "stop") for job in jobs], 2, 640))
    found = await asyncio.gather(*reading)
    assert not worker.jobs and worker.open_rows == 0
    return found


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_what_gathers_for_an_answer_is_one_event(tokenizer, size):
    """With the text that single tokens have; also with calls of the calculator, characters of several tokens, and a stop."""
    tokens, behind = words(tokenizer, "It is ", "[2+3]", "é✓ so"), len(tokenizer.encode(" and on"))
    tokens += tokenizer.encode(" and on")
    at = tokens.index(tokenizer.special("python_end")) + 1
    tokens[at:at] = [tokenizer.special("output_start"), *tokenizer.encode("5"), tokenizer.special("output_end")]
    parts = [tokens[first : first + size] for first in range(0, len(tokens), size)]
    page, chunks = asyncio.run(answers_in(tokenizer, parts))
    assert "".join(event.get("text", "") for event in page) == "It is é✓ so and on"
    assert [event for event in page if "text" not in event] == [{"call": "2+3"}, {"result": "5"}, {"finish": "stop"}]
    choices = [event["choices"][0] for event in chunks[:-1]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "It is  [2+3 → 5] é✓ "
    assert choices[-1]["finish_reason"] == "stop"
    # none behind the stop, also if it came together with it
    assert sum(len(choice["logprobs"]["content"]) for choice in choices if choice["logprobs"]) == len(tokens) - behind
    assert chunks[-1]["usage"]["completion_tokens"] == len(tokens) - behind
    if size == 100:
        assert (len(page), len(chunks)) == (5, 4)


def test_what_comes_before_an_error_is_read_and_what_comes_after_a_removal_is_not():
    async def ask() -> None:
        worker, pipe = idle_worker()
        failing, left = submitted(worker, 2), submitted(worker)
        token = Token(3, True, None, [])
        worker._deliver(Step([(failing.number, 1, [token], None), (failing.number, 0, [token], "stop")], 3, 640))
        assert worker.open_rows == 2
        reading = worker.answer(left)
        worker._deliver(Step([(left.number, 0, [token], None)], 3, 640))
        assert await anext(reading) == [(0, [token], None)]
        await reading.aclose()
        worker._deliver(Step([(left.number, 0, [token], "stop")], 2, 640))
        assert isinstance(pipe.sent[-1], int) and pipe.sent[-1] == left.number and worker.tokens == 4
        worker._fail("broken")
        found = worker.answer(failing)
        assert await anext(found) == [(1, [token], None), (0, [token], "stop")]
        with pytest.raises(WorkerError, match="broken"):
            await anext(found)
        assert [message.job for message in pipe.sent[:2] if isinstance(message, Request)] == [0, 1]
        assert worker.open_rows == 0 and not worker.jobs

    asyncio.run(ask())


def test_rates_are_those_of_the_last_minute(monkeypatch):
    worker, _ = idle_worker()
    now = time.monotonic()
    for later in (0.0, 1.0, 100.0):
        monkeypatch.setattr(worker_module.time, "monotonic", lambda later=later: now + later)
        worker._deliver(Step([], 0, 0))
    assert [at for at, _ in worker.recent] == [now + 100.0]
