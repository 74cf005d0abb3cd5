"""The process of a worker: it loads a model, and decodes the rows of all requests together. The server has the other end of its pipe.

The main thread reads the pipe, also while a model is loaded or a GPU computes, and ends the process when the server closes its end or
dies. Another thread runs the engine, and sends what a step has found of all rows in one message.
"""

import contextlib
import gc
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

import nanochat_kernels as kernels
from nanochat.checkpoint import load_model
from nanochat.inference.engine import Engine, Row, Token
from nanochat.options.chat import WebOptions
from nanochat.platform.distributed import start_runtime
from nanochat.platform.errors import UserError, is_out_of_memory
from nanochat.platform.paths import Paths
from nanochat.platform.signals import ENDING

MakeEngine = Callable[[], Engine]
# beside missing memory the errors of which a command says one line
TOLD = UserError, OSError, kernels.KernelRequestError


class Request(NamedTuple):
    """What the server sends for an answer; the number of its job alone removes the job. samples: rows of the prompt."""

    job: int
    prompt: list[int]
    samples: int
    max_tokens: int
    temperature: float
    top_k: int
    seed: int
    alternatives: int


class Ready(NamedTuple):
    """An engine has been made and takes requests. positions: of the model. rows: the most that it decodes at the same time."""

    positions: int
    rows: int


class Step(NamedTuple):
    """What a step has found: of rows the job, the number in it, new tokens, and why the row has ended (None: it has not)."""

    found: list[tuple[int, int, list[Token], str | None]]
    running: int  # rows that have joined
    cache_tokens: int  # that the cache has room for


class Failed(NamedTuple):
    """The engine has failed, and with it all of its jobs; another one is made."""

    reason: str


def load(paths: Paths, options: WebOptions, step: int, device: torch.device) -> MakeEngine:
    """Load the model of a step; returns what makes an engine of it. Raises UserError."""
    with start_runtime(options.device) as runtime:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model, tokenizer, _ = load_model(paths, options.source, replace(runtime, device=device), options.impl, step)

    def make_engine() -> Engine:
        engine = Engine(model, tokenizer, rows=options.rows, frozen=True)
        engine.decoder.prepare(options.rows, options.top_k)
        return engine

    return make_engine


def run(pipe: Connection, name: str, load: Callable[[], MakeEngine]) -> None:
    """Load a model, and serve it until the server closes its end of the pipe.

    `load` returns what makes an engine of the model, which is called again after an error of the engine. An error of `load` that the
    user can fix is sent, and raised by the server; others are printed.
    """
    for number in ENDING:  # a terminal sends them to all processes; the server says when to end
        signal.signal(number, signal.SIG_IGN)
    inbox: queue.SimpleQueue[Request | int] = queue.SimpleQueue()
    threading.Thread(target=_work, args=(pipe, inbox, name, load), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(pipe.recv())
    os._exit(0)  # whatever the engine does now


def _work(pipe: Connection, inbox: queue.SimpleQueue, name: str, load: Callable[[], MakeEngine]) -> None:
    try:
        try:
            make_engine = load()
            engine = make_engine()
        except Exception as error:
            if not (isinstance(error, TOLD) or is_out_of_memory(error)):
                raise
            pipe.send(error)
            return
        while True:
            gc.freeze()  # a collection that looks through all of torch would stop the rows
            pipe.send(Ready(engine.positions, engine.rows))
            reason = _serve(pipe, inbox, name, engine)
            # what is left of the old engine may be damaged, and its cache must be free before the new one is made
            engine = None
            pipe.send(Failed(reason))
            gc.unfreeze()
            gc.collect()  # exceptions and the frames that they came through refer to each other
            engine = make_engine()
    except BrokenPipeError:  # the server has ended
        pass
    except Exception:
        print(f"nanochat: {name}: {traceback.format_exc()}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def _serve(pipe: Connection, inbox: queue.SimpleQueue, name: str, engine: Engine) -> str:
    """Generate answers until the engine fails; returns the text of its error. Raises BrokenPipeError when the server has ended."""
    jobs: dict[int, dict[int, Row]] = {}  # of each the rows that have not ended, by their numbers
    while True:
        try:
            while not engine.busy or not inbox.empty():
                message = inbox.get()
                _join_or_leave(message, jobs, engine)
                if not engine.busy:  # an answer, which shows the server that this process does not hang
                    pipe.send(Step([], 0, engine.cache.pages.count * engine.cache.page))
            engine.step()
        except BrokenPipeError:
            raise
        except Exception as error:
            print(f"nanochat: {name}: {traceback.format_exc()}", file=sys.stderr, flush=True)
            return str(error) or type(error).__name__
        found = []
        for job, rows in list(jobs.items()):
            for number, row in list(rows.items()):
                if row.output or row.done:
                    found.append((job, number, list(row.output), row.finish))
                    row.output.clear()
                if row.done:
                    del rows[number]
            if not rows:
                del jobs[job]
        running = len(engine.running) + len(engine.filling)
        pipe.send(Step(found, running, engine.cache.pages.count * engine.cache.page))


def _join_or_leave(message: Request | int, jobs: dict[int, dict[int, Row]], engine: Engine) -> None:
    """Let the rows of a request join, or remove those of a job that have not ended."""
    if isinstance(message, Request):
        job, prompt, samples, *sampling, alternatives = message
        rows = [engine.row(prompt, *sampling, sample, alternatives) for sample in range(samples)]
        jobs[job] = dict(enumerate(rows))
        engine.add(rows)
    else:
        for row in jobs.pop(message, {}).values():
            engine.remove(row)
