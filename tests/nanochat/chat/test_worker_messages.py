"""A worker without a process: what its messages do, what gathers for an answer, and when it counts as silent."""

import asyncio
import multiprocessing
import os
import queue
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from nanochat.chat import app, completions, engine_process
from nanochat.chat import worker as worker_module
from nanochat.chat.engine_process import Ready, Request, Step
from nanochat.chat.requests import CompletionRequest
from nanochat.chat.worker import Job, Overloaded, Worker, WorkerError
from nanochat.inference.engine import Token
from tests.nanochat.chat.serving import words

HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


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
