"""OpenAI's API: /v1/models and /v1/chat/completions, so that its clients can talk to the model.

A call of the calculator stands in the text as [expression → result], and becomes a call again when the text comes back in a message.
stop: the text ends before the first of these strings. logprobs are those at temperature 1, of tokens that the model chose.
https://platform.openai.com/docs/api-reference/chat
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from nanochat.chat.app import Service, events_response
from nanochat.chat.requests import MOST_STOPS, CompletionRequest, RequestError, read_body
from nanochat.chat.worker import Job, Worker
from nanochat.inference.engine import Token
from nanochat.inference.session import Event, Reader, Shown
from nanochat.tokenizer.bpe import Tokenizer


@dataclass
class Choice:
    """An answer while it is generated. stops: strings that end it; texts that may be the beginning of one are held back."""

    tokenizer: Tokenizer
    stops: list[str]
    reader: Reader = field(init=False)
    shown: Shown = field(default_factory=Shown)
    held: str = ""
    stopped: bool = False
    tokens: int = 0

    def __post_init__(self) -> None:
        self.reader = Reader(self.tokenizer)

    def add(self, tokens: list[Token], done: bool) -> tuple[str, list[Token]]:
        """The text that tokens add to the answer, and those of them that belong to it: none behind a stop. done: no more come."""
        text = ""
        for count, token in enumerate(tokens, 1):
            text += self._show(self.reader.add(token.token))
            if self.stopped:
                tokens = tokens[:count]
                break
        if done and not self.stopped:
            text += self._show(self.reader.end(), done)
        self.tokens += len(tokens)
        return text, tokens

    def _show(self, events: Iterable[Event], done: bool = False) -> str:
        """The text that events add to the answer, up to a stop."""
        text = self.held + "".join(piece for event in events for piece in self.shown.add(event))
        if done:
            text += "".join(self.shown.end())
        if not self.stops:
            return text
        ends = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if ends:
            self.stopped, self.held = True, ""
            return text[: min(ends)]
        most = 0 if done else max(len(stop) - 1 for stop in self.stops)
        size = next(
            (n for n in range(min(most, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stops)), 0
        )
        self.held = text[len(text) - size :]
        return text[: len(text) - size]


def routes(service: Service) -> APIRouter:
    router, created = APIRouter(prefix="/v1"), int(time.time())
    model = {"id": service.model, "object": "model", "created": created, "owned_by": "nanochat"}

    @router.get("/models")
    def models() -> dict:
        return {"object": "list", "data": [model]}

    @router.get("/models/{name}")
    def model_of_name(name: str) -> dict:
        check_model(name)
        return model

    def check_model(name: str | None) -> None:
        if name not in (None, service.model):
            raise RequestError(f"there is no model {name!r}; there is {service.model!r}", 404, "model")

    @router.post("/chat/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionRequest)
        check_model(body.model)
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if len(stops) > MOST_STOPS:
            raise RequestError(f"stop has {len(stops)} strings; there may be {MOST_STOPS}", parameter="stop")
        if body.top_logprobs and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", parameter="top_logprobs")
        if body.max_completion_tokens is not None:
            if body.max_tokens not in (None, body.max_completion_tokens):
                raise RequestError(
                    "max_tokens and max_completion_tokens differ; give one of them", parameter="max_tokens"
                )
            body.max_tokens = body.max_completion_tokens
        worker, job, _ = await service.start(body, body.n or 1, body.top_logprobs or 0)
        choices = [Choice(service.tokenizer, stops) for _ in job.finish]
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.model}
        if body.stream:
            return events_response(
                chunks(worker, job, choices, body, head | {"object": "chat.completion.chunk"}), "[DONE]"
            )
        texts, logprobs = ["" for _ in choices], [[] for _ in choices]

        async def collect() -> None:
            async with contextlib.aclosing(pieces(worker, job, choices)) as found:
                async for part in found:
                    for number, text, tokens, _ in part:
                        texts[number] += text
                        logprobs[number] += logprobs_of(service.tokenizer, tokens)

        await while_connected(request, collect())
        answers = [
            {
                "index": number,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": {"content": logprobs[number], "refusal": None} if body.logprobs else None,
                "finish_reason": finish(choices[number], job, number),
            }
            for number, text in enumerate(texts)
        ]
        return JSONResponse(head | {"object": "chat.completion", "choices": answers, "usage": usage(job, choices)})

    return router


async def while_connected(request: Request, work: Coroutine[None, None, None]) -> None:
    """Do the work for a request whose body has been read. Ends it, and raises ClientDisconnect, when the client goes."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, _ = tasks = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def pieces(
    worker: Worker, job: Job, choices: list[Choice]
) -> AsyncIterator[list[tuple[int, str, list[Token], bool]]]:
    """(number of the choice, text, tokens, whether it has ended) as they come, until every choice has ended or met a stop."""
    left = set(range(len(choices)))
    async with contextlib.aclosing(worker.answer(job)) as answer:
        async for found in answer:
            part = []
            for number, tokens, finish in found:
                if number in left:
                    text, tokens = choices[number].add(tokens, finish is not None)
                    ended = finish is not None or choices[number].stopped
                    left -= {number} if ended else set()
                    part.append((number, text, tokens, ended))
            yield part
            if not left:
                return


async def chunks(
    worker: Worker, job: Job, choices: list[Choice], body: CompletionRequest, head: dict
) -> AsyncIterator[list[dict]]:
    """The chunks of a streamed answer, as many at a time as have come."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    rest = {"usage": None} if with_usage else {}

    def chunk(number: int, delta: dict, logprobs: list | None = None, reason: str | None = None) -> dict:
        found = {"index": number, "delta": delta, "logprobs": None, "finish_reason": reason}
        if logprobs:
            found["logprobs"] = {"content": logprobs, "refusal": None}
        return head | rest | {"choices": [found]}

    yield [chunk(number, {"role": "assistant", "content": ""}) for number in range(len(choices))]
    async with contextlib.aclosing(pieces(worker, job, choices)) as found:
        async for part in found:
            events = []
            for number, text, tokens, ended in part:
                logprobs = logprobs_of(choices[number].tokenizer, tokens) if body.logprobs else []
                if text or logprobs:
                    events.append(chunk(number, {"content": text}, logprobs))
                if ended:
                    events.append(chunk(number, {}, reason=finish(choices[number], job, number)))
            if events:
                yield events
    if with_usage:
        yield [head | {"choices": [], "usage": usage(job, choices)}]


def finish(choice: Choice, job: Job, number: int) -> str | None:
    return "stop" if choice.stopped else job.finish[number]


def usage(job: Job, choices: list[Choice]) -> dict:
    prompt, completion = len(job.prompt), sum(choice.tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def logprobs_of(tokenizer: Tokenizer, tokens: list[Token]) -> list[dict]:
    def entry(token: int, logprob: float) -> dict:
        data = tokenizer.decode_bytes([token])
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": logprob}

    return [
        entry(found.token, found.logprob) | {"top_logprobs": [entry(*likely) for likely in found.likely]}
        for found in tokens
        if found.logprob is not None
    ]
