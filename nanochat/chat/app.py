"""The server of `nanochat web`: the page, its chat as server-sent events, the state of the workers, and OpenAI's API.

    GET  /                        the page
    POST /chat                    an answer as server-sent events: {"text"}, {"call"}, {"result"}, {"forgotten"}, at the end {"finish"}
    GET  /health                  200 while every worker runs and answers, else 503
    GET  /stats                   what the workers do
    GET  /v1/models, POST /v1/chat/completions   see completions.py

A request that is malformed or beyond a limit is answered by 400 and the reason, one too many by 429, and one during the end or
without a worker by 503. One from the page of another site is answered by 403, and one whose body comes too slowly by 408. All
errors have the form of OpenAI's API.
"""

import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from nanochat.chat.requests import ChatRequest, RequestError, prompt_of, read_body
from nanochat.chat.worker import Job, Overloaded, Worker, WorkerError
from nanochat.inference.session import Reader, Text, ToolCall
from nanochat.tokenizer.bpe import Tokenizer

PAGE = Path(__file__).with_name("page.html")
# the page is one file, which loads nothing and is shown in no frame
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"
FIELDS = {Text: "text", ToolCall: "call"}


@dataclass
class Service:
    """What the routes share: the workers, the name of the model, and what a request has that does not say it.

    hosts: the names by which a client may call the server; None allows any.
    """

    workers: list[Worker]
    tokenizer: Tokenizer
    model: str
    temperature: float = 0.6
    top_k: int = 50
    max_tokens: int = 512
    hosts: frozenset[str] | None = None
    ending: bool = False

    async def start(self, request: ChatRequest, samples: int = 1, alternatives: int = 0) -> tuple[Worker, Job, int]:
        """Give a request to the worker with the fewest rows; returns both, and the number of forgotten turns. Raises RequestError."""
        if self.ending:
            raise RequestError("the server is ending", 503)
        tokens = self.max_tokens if request.max_tokens is None else request.max_tokens
        prompt, forgotten = await run_in_threadpool(
            prompt_of, self.tokenizer, request, self.workers[0].positions, tokens
        )
        temperature = self.temperature if request.temperature is None else request.temperature
        top_k = self.top_k if request.top_k is None else request.top_k
        seed = secrets.randbits(63) if request.seed is None else request.seed
        if all(worker.ended for worker in self.workers):
            raise RequestError("every worker has died; the server must be started again", 503)
        serving = [worker for worker in self.workers if worker.serving]
        if not serving:
            raise RequestError("the engine starts again after an error; try again later", 503)
        worker = min(serving, key=lambda worker: worker.open_rows)  # nothing is awaited between this and submit
        most = worker.rows + worker.most_waiting
        if samples > most:
            raise RequestError(
                f"n is {samples}; the server generates and keeps waiting {most} answers at most", parameter="n"
            )
        try:
            job = worker.submit(prompt, samples, tokens, temperature, top_k, seed, alternatives)
            return worker, job, forgotten
        except WorkerError as error:
            raise RequestError(str(error), 503)
        except Overloaded:
            raise RequestError(f"{worker.open_rows} answers are being generated or wait; try again later", 429)


def create_app(service: Service) -> FastAPI:
    """The application. Its workers must have loaded their models; it ends them."""
    from nanochat.chat.completions import routes

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for worker in service.workers:
            worker.attach()
        yield
        for worker in service.workers:
            worker.end()

    async def check(request: Request) -> None:
        check_source(request, service.hosts)

    app = FastAPI(
        title="nanochat", lifespan=lifespan, dependencies=[Depends(check)], docs_url=None, redoc_url=None, openapi_url=None
    )  # fmt: skip
    app.add_middleware(ClientsThatGo)
    started = time.monotonic()

    @app.get("/")
    def page() -> Response:
        return HTMLResponse(
            PAGE.read_text("utf-8"), headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        )

    @app.get("/health")
    async def health() -> Response:
        workers = service.workers
        faults = {
            "ending": service.ending,
            "a worker has died": any(worker.ended for worker in workers),
            "a worker starts again": not all(worker.alive for worker in workers),
            "a worker does not answer": any(worker.silent for worker in workers),
        }
        found = next((name for name, holds in faults.items() if holds), "ok")
        return JSONResponse({"status": found}, 200 if found == "ok" else 503)

    @app.get("/stats")
    async def stats() -> dict:
        found = [worker.stats() for worker in service.workers]
        defaults = {name: getattr(service, name) for name in ("temperature", "top_k", "max_tokens")}
        return {"model": service.model, "seconds": time.monotonic() - started, "defaults": defaults, "workers": found}

    @app.post("/chat")
    async def chat(request: Request) -> Response:
        worker, job, forgotten = await service.start(await read_body(request, ChatRequest))
        return events_response(chat_events(service.tokenizer, worker, job, forgotten))

    app.include_router(routes(service))

    async def answer_error(request: Request, error: Exception) -> Response:
        status = error.status if isinstance(error, RequestError) else getattr(error, "status_code", 500)
        known = isinstance(error, (RequestError, HTTPException, WorkerError))
        message = getattr(error, "detail", str(error)) if known else "the server failed; its log says why"
        headers = {"Retry-After": "5"} if status in (429, 503) else {"Connection": "close"} if status == 408 else {}
        return JSONResponse(error_body(message, status, getattr(error, "parameter", None)), status, headers)

    for kind in (RequestError, HTTPException, WorkerError, Exception):
        app.add_exception_handler(kind, answer_error)
    return app


def check_source(request: Request, hosts: frozenset[str] | None) -> None:
    """Raises RequestError for a request that a page of another site makes in the user's browser.

    Such a page may call a server on the user's machine by its address, and then has another origin, or by a name of its own that
    leads to this machine (DNS rebinding), and then the request has that name as its host.
    """
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if hosts is not None and name not in hosts:
        raise RequestError(f"the host of the request is {host!r}; wanted one of {', '.join(sorted(hosts))}", 403)
    if origin is not None:
        site = request.headers.get("sec-fetch-site")  # what a browser says, also if a proxy has changed the host
        if site != "same-origin" and (site is not None or origin.partition("://")[2] != host):
            raise RequestError(f"the request comes from a page of {origin!r}; use the page of this server", 403)


async def chat_events(tokenizer: Tokenizer, worker: Worker, job: Job, forgotten: int) -> AsyncIterator[list[dict]]:
    """An answer as the page wants it: the events that have come since the last ones, where texts that follow each other are one."""
    if forgotten:
        yield [{"forgotten": forgotten}]
    reader = Reader(tokenizer)
    async with contextlib.aclosing(worker.answer(job)) as answer:
        async for [(_, tokens, finish)] in answer:
            events: list[dict] = []
            read = [event for token in tokens for event in reader.add(token.token)]
            for event in [*read, *(reader.end() if finish else ())]:
                name = FIELDS.get(type(event), "result")
                if name == "text" and events and name in events[-1]:
                    events[-1]["text"] += event.text
                else:
                    events.append({name: event.text})
            if finish:
                events.append({"finish": finish})
            if events:
                yield events


def error_body(message: str, status: int, parameter: str | None = None) -> dict:
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return {
        "error": {
            "message": message,
            "type": "rate_limit_error" if status == 429 else kind,
            "param": parameter,
            "code": None,
        }
    }


def events_response(parts: AsyncIterator[list[dict]], last: str = "") -> Response:
    """Server-sent events, each with JSON, and `last` at the end. An error of the worker becomes the last event."""

    async def lines() -> AsyncIterator[str]:
        async with contextlib.aclosing(parts):
            try:
                async for events in parts:
                    yield "".join(f"data: {json.dumps(event)}\n\n" for event in events)
                if last:
                    yield f"data: {last}\n\n"
            except WorkerError as error:
                yield f"data: {json.dumps(error_body(f'the answer broke off: {error}', 500))}\n\n"

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )


class ClientsThatGo:
    """Makes no error of a client that goes."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnect):
            await self.app(scope, receive, send)
