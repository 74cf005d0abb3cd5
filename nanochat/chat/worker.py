"""A worker: the thread that runs an engine, for requests that come from the event loop of a server."""

import asyncio
import gc
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import torch

from nanochat.inference.engine import Engine, Row, Token

WINDOW = 60  # seconds over which tokens per second are counted


class Overloaded(Exception):
    """The worker cannot take more requests now."""


class WorkerError(Exception):
    """The engine failed while it generated an answer, or its thread has ended."""


@dataclass(eq=False)
class Job:
    """Rows of one request, and where their tokens go. Items of `found`: (number of the row, its tokens, whether it has ended)."""

    rows: list[Row]
    loop: asyncio.AbstractEventLoop
    found: asyncio.Queue = field(default_factory=asyncio.Queue)
    left: set[int] = field(default_factory=set)  # numbers of rows that have not ended; touched by the worker alone

    def tell(self, item: object) -> None:
        try:
            self.loop.call_soon_threadsafe(self.found.put_nowait, item)
        except RuntimeError:  # the server's loop has ended
            pass


class Worker(threading.Thread):
    """Decodes the rows of all requests together. make_engine is called again after an error of the engine.

    most_waiting: rows that may wait for a place among those that are decoded; `submit` raises Overloaded beyond them.
    """

    def __init__(self, name: str, make_engine: Callable[[], Engine], most_waiting: int):
        super().__init__(name=name, daemon=True)
        self.make_engine, self.most_waiting = make_engine, most_waiting
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()  # ("add" or "remove", job), or None to end
        self.engine: Engine | None = make_engine()  # None while another one is made
        self.tokenizer, self.positions, self.rows = self.engine.tokenizer, self.engine.positions, self.engine.rows
        self.jobs: list[Job] = []
        self.started, self.requests, self.errors, self.tokens = time.monotonic(), 0, 0, 0
        self.recent: deque[tuple[float, int]] = deque()
        self.open_rows, self.lock = 0, threading.Lock()  # rows that were submitted and have not ended
        self.ended = False  # nothing is submitted any more

    def submit(self, rows: list[Row]) -> Job:
        """Let the rows join, from the event loop. Raises Overloaded, and WorkerError after the thread's end."""
        job = Job(rows, asyncio.get_running_loop(), left=set(range(len(rows))))
        with self.lock:
            if self.ended:
                raise WorkerError(f"{self.name} has ended")
            if self.open_rows + len(rows) > self.rows + self.most_waiting:
                raise Overloaded
            self.open_rows += len(rows)
            self.requests += 1
            self.inbox.put(("add", job))
        return job

    async def answer(self, job: Job) -> AsyncIterator[tuple[int, list[Token], bool]]:
        """The tokens of the job's rows as they come. Rows are removed when nobody reads them any more. Raises WorkerError."""
        left = len(job.rows)
        try:
            while left:
                item = await job.found.get()
                if isinstance(item, WorkerError):
                    raise item
                left -= item[2]
                yield item
        finally:
            if left:
                self.inbox.put(("remove", job))

    def end(self) -> None:
        """End the thread; requests that are not finished get an error."""
        self.inbox.put(None)

    def run(self) -> None:
        if self.engine.model.device.type == "cuda":
            torch.cuda.set_device(self.engine.model.device)
        reason = "its worker has died"
        try:
            while (error := self._serve()) is not None:
                # what is left of the old engine may be damaged, and its cache must be free before the new one is made
                self.engine = None
                self._fail(error)
                gc.collect()  # exceptions and the frames that they came through refer to each other
                self.engine = self.make_engine()
            reason = "the server ends"
        finally:
            with self.lock:
                self.ended = True
            while not self.inbox.empty():
                message = self.inbox.get()
                if message is not None and message[0] == "add":
                    self.jobs.append(message[1])
            self._fail(reason)

    def _serve(self) -> str | None:
        """Generate answers until the engine fails; returns the text of its error, or None when the thread is to end."""
        try:
            while True:
                while not self.engine.busy or not self.inbox.empty():
                    message = self.inbox.get()
                    if message is None:
                        return None
                    self._take(*message)
                self.engine.step()
                self._deliver()
        except Exception as error:
            self.errors += 1
            print(f"nanochat: {self.name}: {traceback.format_exc()}", file=sys.stderr, flush=True)
            return str(error) or type(error).__name__

    def _take(self, action: str, job: Job) -> None:
        if action == "add":
            self.jobs.append(job)
            self.engine.add(job.rows)
        elif job in self.jobs:
            self._close(job)

    def _deliver(self) -> None:
        count = 0
        for job in list(self.jobs):
            for number, row in enumerate(job.rows):
                if number in job.left and (row.output or row.done):
                    tokens = list(row.output)
                    row.output.clear()
                    count += len(tokens)
                    if row.done:
                        job.left.remove(number)
                    job.tell((number, tokens, row.done))
            if not job.left:
                self._close(job)
        now = time.monotonic()
        self.tokens += count
        self.recent.append((now, count))
        while self.recent[0][0] < now - WINDOW:
            self.recent.popleft()

    def _close(self, job: Job) -> None:
        """Forget a job, whose rows have ended or end now."""
        self.jobs.remove(job)
        for row in job.rows:
            self.engine.remove(row)
        with self.lock:
            self.open_rows -= len(job.rows)

    def _fail(self, reason: str) -> None:
        for job in list(self.jobs):
            job.tell(WorkerError(reason))
            self.jobs.remove(job)
            with self.lock:
                self.open_rows -= len(job.rows)

    def stats(self) -> dict[str, float | int | str | bool]:
        """What the worker does now, and has done since it started."""
        engine, recent = self.engine, list(self.recent)
        running = len(engine.running) + len(engine.filling) if engine else 0
        seconds = min(WINDOW, time.monotonic() - self.started)
        return {
            "name": self.name,
            "alive": self.is_alive(),
            "running": running,
            "waiting": max(0, self.open_rows - running),
            "requests": self.requests,
            "errors": self.errors,
            "tokens": self.tokens,
            "tokens_per_second": sum(count for at, count in recent if at > time.monotonic() - WINDOW)
            / max(seconds, 1e-9),
            "cache_tokens": engine.cache.pages.count * engine.cache.page if engine else 0,
        }
