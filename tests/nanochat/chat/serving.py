"""A server in this process, whose engine says what a script says, and what talks to it."""

import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nanochat.chat.app import Service, create_app
from nanochat.chat.connections import make_server
from nanochat.chat.worker import Worker
from nanochat.inference.engine import Engine
from nanochat.tokenizer.bpe import Tokenizer


class Says(Engine):
    """An engine whose model says what `script` makes of the prompt's text, a token every `delay` seconds at most."""

    def __init__(self, model, tokenizer: Tokenizer, script: Callable[[str], list[int]], delay: float = 0.0, **options):
        super().__init__(model, tokenizer, **options)
        self.script, self.delay, self.left = script, delay, {}

    def step(self) -> None:
        time.sleep(self.delay)
        super().step()

    def _next(self, row, sampled):
        if row.forced:
            return super()._next(row, sampled)
        if row not in self.left:
            self.left[row] = iter(self.script(self.tokenizer.decode(row.prompt)))
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
    make_engine: Callable[[], Engine], most_waiting: int = 256, workers: int = 1, connections: int = 1024, **defaults
) -> Iterator[Server]:
    """A server on a free port, until the block ends. It must report no error."""
    found = [Worker(f"worker {number}", make_engine, most_waiting) for number in range(workers)]
    service = Service(found, "tiny", **defaults)
    for worker in found:
        worker.start()
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
        # what uvicorn says of a client that was dropped because it took nothing
        assert all("returned without completing response" in error for error in errors.found), errors.found
        assert not thread.is_alive() and not any(worker.is_alive() for worker in found)
