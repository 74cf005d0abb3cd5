"""The connections of the server: how many there may be, which gives way to another, and how long one may say or take nothing."""

import asyncio
import os
import resource
import socket
from functools import partial

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.chat.app import error_body
from nanochat.platform.console import say
from nanochat.platform.errors import UserError

MOST_CONNECTIONS = 1024
SPARE_FILES = 64  # that the process may open besides its connections
SLOWEST_HEADER = 30.0  # seconds in which the header of a request must arrive
SLOWEST_READER = 60.0  # seconds until a client that takes nothing of its answer is dropped
CROWDED = "every connection of the server has a request that is not answered yet; try again later"


class Connection(H11Protocol):
    """A connection. One too many closes the one that has been without a request for the longest time, and is answered by 503 if
    there is none."""

    def __init__(self, *positional, most: int, **named):
        super().__init__(*positional, **named)
        self.most = most
        self.idle_since = 0.0
        self.deadline: asyncio.TimerHandle | None = None  # of a header
        self.read_deadline: asyncio.TimerHandle | None = None  # of what waits to be taken

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        others = [connection for connection in self.connections if not connection.transport.is_closing()]
        super().connection_made(transport)
        if len(others) >= self.most:
            idle = [connection for connection in others if connection.idle]
            if idle:
                min(idle, key=lambda connection: connection.idle_since).transport.close()
            else:
                headers = {"Retry-After": "5", "Connection": "close"}
                self.app = JSONResponse(error_body(CROWDED, 503), 503, headers)
        self.idle_since = self.loop.time()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.read_deadline = self.loop.call_later(SLOWEST_READER, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.read_deadline.cancel()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._forget_deadline()
        if self.read_deadline is not None:
            self.read_deadline.cancel()

    def _watch(self) -> None:
        """Let the time of a header begin, unless it has, and end it when the header is there."""
        if not self.idle:
            self._forget_deadline()
        elif self.deadline is None:
            self.deadline = self.loop.call_later(SLOWEST_HEADER, self.transport.close)

    def _forget_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline = None


class Server(uvicorn.Server):
    """A server whose clients may wait in a long queue, from which few are taken at a time: each takes a file, and those that are closed
    for them give theirs back two turns of the event loop later."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(MOST_CONNECTIONS)  # asyncio takes as many at once as `backlog` lets wait


def make_server(app: ASGIApp, connections: int, seconds_to_end: float) -> Server:
    """A server that is not running yet. seconds_to_end: how long requests may take once it is asked to end."""
    return Server(
        uvicorn.Config(
            app, http=partial(Connection, most=connections), ws="none", log_level="warning", timeout_keep_alive=30,
            timeout_graceful_shutdown=seconds_to_end, backlog=8,
        )
    )  # fmt: skip


def most_connections() -> int:
    """How many connections this process may have, MOST_CONNECTIONS if the system lets it open as many files.

    Raises the limit of open files where that is allowed. Raises UserError when it leaves no connection.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = len(os.listdir("/dev/fd")) + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < taken + MOST_CONNECTIONS:
        soft = taken + MOST_CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, taken + MOST_CONNECTIONS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    connections = MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, soft - taken)
    if connections < 1:
        raise UserError(
            f"this process may open {soft} files, and needs {taken + 1} at least; raise the limit: ulimit -Hn {2 * taken}"
        )
    if connections < MOST_CONNECTIONS:
        say(f"note at most {connections} connections, because this process may open {soft} files (ulimit -Hn)")
    return connections
