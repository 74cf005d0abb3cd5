"""A worker as the server sees it: a process with an engine, the requests that it has, and what it has found of them."""

import asyncio
import itertools
import multiprocessing
import select
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from nanochat.chat import engine_process
from nanochat.chat.engine_process import Failed, MakeEngine, Ready, Request, Step
from nanochat.inference.engine import Token
from nanochat.platform.errors import UserError

WINDOW = 60  # seconds over which tokens per second are counted
SILENCE = 60  # seconds without an answer after which a process is taken for one that hangs
MOST_DEATHS, DEATHS_WINDOW = 3, 600.0  # a process that dies more often in so many seconds is not started again
# CUDA does not survive a fork, so that one process imports torch, touches no GPU and makes the forks; on macOS no fork may use Metal
PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


class Overloaded(Exception):
    """The worker cannot take more requests now."""


class WorkerError(Exception):
    """The engine failed while it generated an answer, or its process has ended."""


@dataclass(eq=False)
class Job:
    """The answers to a prompt. finish: why each has ended, None while it has not. found: tokens of each that were not taken yet."""

    number: int
    prompt: list[int]
    finish: list[str | None]
    found: dict[int, list[Token]] = field(default_factory=dict)
    error: str = ""
    came: asyncio.Event = field(default_factory=asyncio.Event)


class Worker:
    """A process that decodes the rows of all requests together; it is started again when it dies. From `attach` to `end` the methods
    are called from the event loop.

    load: called in the process; see `engine_process.run`. most_waiting: rows that may wait for a place among those that are decoded.
    serving: whether requests are taken; not while an engine is made. alive: whether there is a process that has loaded its model.
    """

    def __init__(self, name: str, load: Callable[[], MakeEngine], most_waiting: int):
        self.name, self.load, self.most_waiting = name, load, most_waiting
        self.jobs: dict[int, Job] = {}  # by their numbers; those that have not ended
        self.numbers = itertools.count()
        self.serving = self.alive = self.asked = False  # asked: something was sent since the process said something
        self.ended = False  # the process is not started again
        self.started = self.heard = time.monotonic()
        self.requests = self.errors = self.tokens = 0
        self.running = self.cache_tokens = 0
        self.recent: deque[tuple[float, int]] = deque()
        self.restarts, self.deaths = 0, []
        self.restart: asyncio.Task | None = None
        self._start()

    def _start(self) -> None:
        pipe, theirs = PROCESSES.Pipe()
        process = PROCESSES.Process(target=engine_process.run, args=(theirs, self.name, self.load), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends with the process
        self.pipe, self.process = pipe, process
        if self.ended:  # it was asked to end meanwhile, by another thread, which has closed the old pipe
            self._close()

    def wait(self) -> None:
        """Wait until the model is loaded. Raises the error that the process has sent, and UserError if it has died."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            raise UserError(f"the process of {self.name} ended before it served ({self._status()})")
        if isinstance(message, Exception):
            raise message
        self._take(message)

    def attach(self) -> None:
        """Read the pipe from the running event loop from now on."""
        asyncio.get_running_loop().add_reader(self.pipe.fileno(), self._receive)

    @property
    def silent(self) -> bool:
        """Whether the process has rows, or a message, or makes an engine, and has said nothing for a while."""
        busy = self.jobs or self.asked or (self.alive and not self.serving)
        return bool(busy) and time.monotonic() - self.heard > SILENCE

    @property
    def open_rows(self) -> int:
        """Rows that were submitted and have not ended."""
        return sum(job.finish.count(None) for job in self.jobs.values())

    def submit(self, prompt: list[int], samples: int, *sampling) -> Job:
        """Let rows of a prompt join; sampling: the other fields of Request. Raises Overloaded and WorkerError."""
        if not self.serving:
            raise WorkerError(f"{self.name} does not serve now")
        if self.open_rows + samples > self.rows + self.most_waiting:
            raise Overloaded
        job = Job(next(self.numbers), prompt, [None] * samples)
        try:
            if not self._send(Request(job.number, prompt, samples, *sampling)):
                raise Overloaded
        except OSError:  # which the loop has not noticed yet
            raise WorkerError("its worker has died")
        self.jobs[job.number] = job
        self.requests += 1
        return job

    async def answer(self, job: Job) -> AsyncIterator[list[tuple[int, list[Token], str | None]]]:
        """What has come of the job's rows since the last time: of each the number, tokens, and why it has ended. Rows are removed when
        nobody reads them any more. Raises WorkerError."""
        try:
            while True:
                await job.came.wait()
                job.came.clear()
                found, job.found = job.found, {}
                if found:
                    yield [(number, tokens, job.finish[number]) for number, tokens in found.items()]
                    if job.found:  # it came while the reader was busy
                        continue
                if job.error:
                    raise WorkerError(job.error)
                if None not in job.finish:
                    return
        finally:
            if self.jobs.pop(job.number, None):
                self._remove(job.number)

    def _remove(self, number: int) -> None:
        with suppress(OSError):  # the process has died
            if not self._send(number):
                asyncio.get_running_loop().call_later(1.0, self._remove, number)

    def _send(self, message: Request | int) -> bool:
        """Whether the pipe has taken the message at once. It does not where the process is stopped or cannot read it, and the server
        must not wait for that."""
        poll = select.poll()
        poll.register(self.pipe, select.POLLOUT)
        if not poll.poll(0):
            return False
        if not (self.jobs or self.asked):  # the process had nothing to say
            self.heard = time.monotonic()
        self.asked = True
        self.pipe.send(message)
        return True

    def _receive(self) -> None:
        """Take all that the process has sent, so that what has gathered while the loop was busy is delivered together."""
        try:
            while self.pipe.poll():
                self._take(self.pipe.recv())
        except (EOFError, OSError):
            self._died()

    def _take(self, message: Ready | Step | Failed | Exception) -> None:
        self.heard, self.asked = time.monotonic(), False
        if isinstance(message, Step):
            self._deliver(message)
        elif isinstance(message, Ready):
            self.positions, self.rows = message
            self.serving = self.alive = True
        elif isinstance(message, Failed):
            self.serving = False
            self.errors += 1
            for number in self.jobs:  # some of which may still lie in the pipe
                self._remove(number)
            self._fail(message.reason)
        else:  # the model cannot be loaded again; the process ends
            print(f"nanochat: {self.name}: {message}", file=sys.stderr, flush=True)

    def _deliver(self, step: Step) -> None:
        self.running, self.cache_tokens = step.running, step.cache_tokens
        count = 0
        for number, row, tokens, finish in step.found:
            count += len(tokens)
            job = self.jobs.get(number)
            if job is None:  # it was removed meanwhile
                continue
            job.found.setdefault(row, []).extend(tokens)
            job.finish[row] = finish
            job.came.set()
            if finish and None not in job.finish:
                del self.jobs[number]
        now = time.monotonic()
        self.tokens += count
        self.recent.append((now, count))
        while self.recent[0][0] < now - WINDOW:
            self.recent.popleft()

    def _fail(self, reason: str) -> None:
        """Give all jobs an error."""
        for job in self.jobs.values():
            job.error = reason
            job.came.set()
        self.jobs.clear()
        self.running = self.cache_tokens = 0

    def _died(self) -> None:
        if self.ended:  # a second signal ends the workers while the loop still runs
            return
        self._close()
        self._fail("its worker has died")
        self.errors += 1
        now = time.monotonic()
        self.deaths = [at for at in self.deaths if at > now - DEATHS_WINDOW] + [now]
        self.restart = asyncio.get_running_loop().create_task(self._start_again())

    async def _start_again(self) -> None:
        often = len(self.deaths) > MOST_DEATHS
        status = await asyncio.to_thread(self._status)
        then = f"it died {len(self.deaths)} times and is not started again" if often else "it is started again"
        print(f"nanochat: {self.name}: its process has died ({status}); {then}", file=sys.stderr, flush=True)
        self.ended = often
        if not self.ended:
            self.restarts += 1
            try:
                await asyncio.to_thread(self._start)
            except (OSError, EOFError) as error:
                print(f"nanochat: {self.name}: it cannot be started again ({error})", file=sys.stderr, flush=True)
                self.ended = True
            else:
                self.attach()

    def _status(self) -> str:
        self.process.join(5)
        if self.process.is_alive():  # it has closed its pipe, and another one needs its memory
            self.process.kill()
            self.process.join()
        return f"status {self.process.exitcode}"

    def _close(self) -> None:
        """Close the pipe, which ends the process."""
        self.serving = self.alive = self.asked = False
        if not self.pipe.closed:
            with suppress(RuntimeError):  # no loop runs
                asyncio.get_running_loop().remove_reader(self.pipe.fileno())
            self.pipe.close()

    def end(self) -> None:
        """End the process; requests that are not finished get an error."""
        if self.restart:
            self.restart.cancel()
        self.ended = True
        self._close()
        self._fail("the server ends")

    def join(self, seconds: float) -> None:
        """Wait for the end of a process that was asked to end, and kill it if it takes longer."""
        self.end()
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def stats(self) -> dict[str, float | int | str | bool]:
        """What the worker does now, and has done since the server started."""
        now, open_rows = time.monotonic(), self.open_rows
        running = min(self.running, open_rows)  # others have been removed since the last step
        return {
            "name": self.name,
            "alive": self.alive,
            "running": running,
            "waiting": open_rows - running,
            "requests": self.requests,
            "errors": self.errors,
            "restarts": self.restarts,
            "tokens": self.tokens,
            "tokens_per_second": sum(count for at, count in self.recent if at > now - WINDOW)
            / max(min(WINDOW, now - self.started), 1e-9),
            "cache_tokens": self.cache_tokens,
        }
