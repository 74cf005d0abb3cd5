"""What a request to the server may be: its fields, their limits, and the prompt that it stands for."""

import asyncio
import re
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from nanochat.inference.calculator import calculate
from nanochat.inference.sampling import check_room
from nanochat.platform.errors import UserError
from nanochat.tokenizer.bpe import Tokenizer
from nanochat.tokenizer.chat_format import render_prompt

# the page counts messages and characters too, to leave out the oldest turns. MOST_CHARACTERS: of a message that no model wrote
MOST_MESSAGES, MOST_CHARACTERS, MOST_TOGETHER = 500, 8_000, 32_000
MOST_TOKENS, MOST_TOP_K, MOST_TEMPERATURE = 4096, 200, 2.0
MOST_CHOICES, MOST_STOPS = 16, 4
MOST_BYTES = 1 << 20  # of a body; 32,000 characters, each written as \uXXXX\uXXXX, take less than half
SLOWEST_BODY = 30.0  # seconds in which a body must arrive
Body = TypeVar("Body", bound=BaseModel)


class RequestError(Exception):
    """A request that cannot be served, with the status and the reason of the answer."""

    def __init__(self, message: str, status: int = 400, parameter: str | None = None):
        super().__init__(message)
        self.status, self.parameter = status, parameter


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Part(Strict):
    """Of a message: text, what the assistant gave to the calculator (python), or the calculator's result (python_output)."""

    type: Literal["text", "python", "python_output"]
    text: str


class Message(BaseModel):
    """Other fields, such as the name of who wrote it, change nothing."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class ChatRequest(Strict):
    """The body of POST /chat."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    temperature: Annotated[float, Field(ge=0, le=MOST_TEMPERATURE, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=1, le=MOST_TOP_K)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None


class StreamOptions(Strict):
    include_usage: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class CompletionRequest(ChatRequest):
    """The body of POST /v1/chat/completions. Fields that would change the answer in a way that is not supported are errors."""

    model: str | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # accepted with the values that change nothing
    top_p: Annotated[float, Field(ge=1, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    tool_choice: Literal["none", "auto"] | None = None
    # accepted and not used
    parallel_tool_calls: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The body of a request. Raises RequestError for one that is too large or slow, or is not what `kind` says."""
    body = bytearray()

    async def receive() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > MOST_BYTES:
                raise RequestError(f"the body has more than {MOST_BYTES:,} bytes")

    try:
        await asyncio.wait_for(receive(), SLOWEST_BODY)
    except asyncio.TimeoutError:
        raise RequestError(f"the body did not arrive in {SLOWEST_BODY:g} seconds; send all of it at once", 408)
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        first, where = first_mistake(error.errors(include_url=False, include_context=False), body)
        got = "" if first["type"] in ("missing", "json_invalid") else f", got {first['input']!r:.80}"
        raise RequestError(
            f"{where}: {first['msg']}{got}" if where else f"{first['msg']}{got}", parameter=where or None
        )


def first_mistake(errors: list[dict], body: bytes) -> tuple[dict, str]:
    """Of pydantic's errors about a body the first, and its place there, such as "messages.0.content".

    A value that may be of several types has an error for each type, whose place ends with the name of the type, which is left out. The
    error that is deepest in the value is of the type that the client meant.
    """

    whole = None if errors[0]["type"] == "json_invalid" else TypeAdapter(Any).validate_json(body)

    def place(error: dict) -> tuple:
        found, value = [], whole
        for part in error["loc"]:
            known = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
            if known:
                value = value[part]
            if known or (error["type"] == "missing" and part == error["loc"][-1]):
                found.append(part)
        return tuple(found)

    places = [place(error) for error in errors]
    same = [number for number, found in enumerate(places) if found[: len(places[0])] == places[0]]
    number = max(same, key=lambda number: len(places[number]))  # the first of those that are deepest
    return errors[number], ".".join(map(str, places[number]))


def prompt_of(tokenizer: Tokenizer, request: ChatRequest, positions: int, max_tokens: int) -> tuple[list[int], int]:
    """The tokens of the conversation up to the answer, and how many of the oldest turns were left out because they do not fit.

    An answer gets max_tokens, but no more than a quarter of the positions. Raises RequestError for a conversation that is malformed
    or too long.
    """
    messages = [as_conversation(message) for message in request.messages]
    lengths = [sum(len(part["text"]) for part in parts_of(message)) for message in messages]
    for number, length in enumerate(lengths):
        if (
            length > MOST_CHARACTERS and messages[number]["role"] != "assistant"
        ):  # whose answers may be longer, and come back
            raise RequestError(f"message {number} has {length:,} characters; there may be {MOST_CHARACTERS:,}")
    if sum(lengths) > MOST_TOGETHER:
        raise RequestError(f"the messages have {sum(lengths):,} characters together; there may be {MOST_TOGETHER:,}")
    if messages[-1]["role"] != "user":
        raise RequestError(f"the last message must be from the user, got one from the {messages[-1]['role']}")
    system, turns = messages[: messages[0]["role"] == "system"], messages[messages[0]["role"] == "system" :]

    def prompt(dropped: int) -> list[int]:
        return render_prompt(tokenizer, {"messages": [*system, *turns[2 * dropped :]]})

    try:
        found, dropped, most = prompt(0), 0, positions - min(max_tokens, positions // 4)
        low, high = 0, len(turns) // 2  # the turns to drop are more than low, and at most high
        if len(found) > most and high:
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if len(prompt(middle)) <= most else (middle, high)
            found, dropped = prompt(high), high
        check_room(found, positions)
        return found, dropped
    except UserError as error:
        raise RequestError(str(error))


SHOWN_CALL = re.compile(r" \[([^\[\]→]+) → ([^\[\]→]+)\] ")  # as `shown` writes a call of the calculator


def as_conversation(message: Message) -> dict:
    """A message in the form that training has: text, and for the assistant parts, in which calls of the calculator are calls again."""
    role = "system" if message.role == "developer" else message.role
    if role != "assistant":
        return {"role": role, "content": "".join(part["text"] for part in parts_of(message.model_dump()))}
    if not isinstance(message.content, str):
        return {"role": role, "content": [part.model_dump() for part in message.content]}
    parts, end = [], 0
    for call in SHOWN_CALL.finditer(message.content):
        if calculate(call[1]) == call[2]:
            parts += [
                {"type": "text", "text": message.content[end : call.start()]},
                {"type": "python", "text": call[1]},
            ]
            parts += [{"type": "python_output", "text": call[2]}]
            end = call.end()
    parts.append({"type": "text", "text": message.content[end:]})
    return {"role": role, "content": [part for part in parts if part["text"]]}


def parts_of(message: dict) -> list[dict]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
