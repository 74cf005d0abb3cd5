"""A server in this process, the engines of its workers, which say what the tests want, and what talks to the server."""

import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import torch

from nanochat.chat.app import Service, create_app
from nanochat.chat.connections import make_server
from nanochat.chat.engine_process import MakeEngine
from nanochat.chat.worker import Worker
from nanochat.gpt import GPTConfig
from nanochat.inference.engine import Engine
from nanochat.platform.paths import Paths
from nanochat.tokenizer.bpe import Tokenizer
from tests.nanochat.models import perturbed

SHAPE = (2, 64, 4, 2, 64)  # of a GPTConfig: depth, width, heads, key/value heads, context length


def load(tokenizer: Path, kind: Callable[..., Engine], *parts: str, shape: tuple = SHAPE, **options) -> MakeEngine:
    """What a worker of a test calls in its process; kind(model, tokenizer, *parts, **options) makes an engine."""
    torch.set_num_threads(1)
    found = Tokenizer.load(tokenizer)
    model = perturbed(GPTConfig(*shape[:4], found.vocab_size, shape[4]))
    return partial(kind, model, found, *parts, **options)


class Says(Engine):
    """An engine whose model says the parts, a token every `delay` seconds at most."""

    def __init__(self, model, tokenizer: Tokenizer, *parts: str, delay: float = 0.0, **options):
        super().__init__(model, tokenizer, **options)
        self.parts, self.delay, self.left = parts, delay, {}

    def answer(self, prompt: str) -> list[int]:
        """The tokens of the answer to a prompt."""
        return words(self.tokenizer, *self.parts)

    def step(self) -> None:
        time.sleep(self.delay)
        super().step()

    def _next(self, row, sampled):
        if row.forced:
            return super()._next(row, sampled)
        if row not in self.left:
            self.left[row] = iter(self.answer(self.tokenizer.decode(row.prompt)))
        return super()._next(row, next(self.left[row], self.tokenizer.special("assistant_end")))


def words(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """Tokens of an answer; a part in brackets is given to the calculator."""
    found = []
    for part in parts:
        if part.startswith("["):
            ends = tokenizer.special("python_start"), tokenizer.special("python_end")
            found += [ends[0], *tokenizer.encode(part[1:-1]), ends[1]]
        else:
            found += tokenizer.encode(part)
    return found


class Server:
    """A running server and its service."""

    def __init__(self, service: Service, port: int):
        self.service, self.port, self.url = service, port, f"http://127.0.0.1:{port}"

    def request(self, path: str, body: object = None, raw: bytes | None = None, **headers: str) -> tuple[int, object]:
        """The status and the JSON of an answer. headers: such as Sec_Fetch_Site="cross-site"."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, named), timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def chat(self, text: str, **more) -> list[dict]:
        """The events of an answer to one message."""
        body = json.dumps({"messages": [{"role": "user", "content": text}], **more}).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + "/chat", body), timeout=60) as response:
            return [json.loads(line[6:]) for line in response.read().decode().split("\n\n") if line]

    @property
    def open_rows(self) -> int:
        """Answers that are being generated or wait."""
        return sum(worker["running"] + worker["waiting"] for worker in self.request("/stats")[1]["workers"])

    def wait_until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.request("/stats")
            time.sleep(0.02)


class Errors(logging.Handler):
    """Collects what the server reports as errors."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(f"{record.getMessage()} {record.exc_info}")


@contextmanager
def serving(
    paths: Paths,
    kind: Callable[..., Engine] = Engine,
    *parts: str,
    load: Callable[..., MakeEngine] = load,
    most_waiting: int = 256,
    workers: int = 1,
    connections: int = 1024,
    hosts: frozenset[str] | None = None,
    **options,
) -> Iterator[Server]:
    """A server on a free port, until the block ends; kind, parts and options as in `load`. It must report no error."""
    forkserver.set_forkserver_preload([__name__])
    loads = partial(load, paths.tokenizer, kind, *parts, **options)
    found = [Worker(f"worker {number}", loads, most_waiting) for number in range(workers)]
    for worker in found:
        worker.wait()
    service = Service(found, Tokenizer.load(paths.tokenizer), "tiny", hosts=hosts)
    listener = socket.create_server(("127.0.0.1", 0))
    server = make_server(create_app(service), connections, seconds_to_end=1)
    errors = Errors()
    logging.getLogger("uvicorn.error").addHandler(errors)  # not before uvicorn has configured its loggers
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Server(service, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        for worker in found:
            worker.join(20)
        logging.getLogger("uvicorn.error").removeHandler(errors)
        assert not errors.found
        assert not thread.is_alive() and not any(worker.process.is_alive() for worker in found)
