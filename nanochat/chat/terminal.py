"""Chat in the terminal, or one prompt and its answer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from nanochat.checkpoint import load_model
from nanochat.console import console, say
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.gpt import Implementations
from nanochat.paths import Paths
from nanochat.runtime import start_runtime
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatConfig:
    """Chat with a model: type to talk, `clear` to start anew, `quit` to leave."""

    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = ""
    """one prompt; its answer is printed and the command ends"""
    source: Literal["base", "mid", "sft"] = "sft"
    """whose newest checkpoint"""
    temperature: float = 0.6
    """0 takes the most likely token"""
    top_k: int = 50
    """sample from this many likeliest tokens"""
    max_tokens: int = 512
    """tokens of an answer at most"""
    seed: int = 42
    """seed of the sampling"""
    device: str = "auto"
    """auto, cuda, cpu or mps"""
    impl: Implementations = field(default_factory=Implementations)


def run_chat(config: ChatConfig, paths: Paths) -> None:
    with start_runtime(config.device) as runtime:
        model, tokenizer, _ = load_model(paths, config.source, runtime, config.impl)
    engine = Engine(model, tokenizer)
    if config.prompt:
        print_answer(engine, [{"role": "user", "content": config.prompt}], config)
        return
    say(f"nanochat ({config.source}); `clear` starts anew, `quit` leaves")
    messages: list[dict] = []
    while True:
        try:
            text = console.input("[bold]you:[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        if text.lower() in ("quit", "exit"):
            return
        if text.lower() == "clear":
            messages = []
            say("(a new conversation)")
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                answer = print_answer(engine, messages, config)
            except UserError as error:  # the conversation has outgrown the model
                say(f"{error}; `clear` starts a new one")
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})


def print_answer(engine: Engine, messages: list[dict], config: ChatConfig) -> str:
    """Stream the answer to the terminal; returns its text."""
    tokenizer = engine.tokenizer
    prompt = [*tokenizer.render({"messages": messages})[0], tokenizer.special("assistant_start")]
    sampling = {"temperature": config.temperature, "top_k": config.top_k, "seed": config.seed}
    tokens = (column[0] for column, _ in engine.stream([prompt], config.max_tokens, **sampling))
    console.print("[bold]nanochat:[/bold] ", end="")
    pieces = []
    for piece in whole_characters(tokenizer, tokens):
        console.print(piece, end="", markup=False)
        pieces.append(piece)
    say("")
    return "".join(pieces)


def whole_characters(tokenizer: Tokenizer, tokens: Iterator[int | None]) -> Iterator[str]:
    """Text of a stream of tokens, held back while a character is incomplete; tool calls shown as [expression → result]."""
    frames = {"python_start": " [", "python_end": "", "output_start": " → ", "output_end": "] "}
    marks = {tokenizer.special(name): mark for name, mark in frames.items()}
    waiting: list[int] = []
    for token in tokens:
        if token is None:
            break
        if token in marks:
            yield marks[token]
            continue
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd") or len(waiting) > 8:
            waiting = []
            yield text
    if waiting:
        yield tokenizer.decode(waiting)
