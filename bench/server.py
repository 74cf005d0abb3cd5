"""Time the server: python -m bench.server --depth 20

All users ask at the same moment: each sends a streaming chat to `nanochat web`, which runs in processes of its own and does not share
their interpreter, though it shares the cores. Then the engine alone, without HTTP, is given the same prompts and seeds.

    first     from sending a request to the first text of its answer
    token     from one piece of an answer's text to the next; nearly every token is a piece, unless the server is behind the engine,
              when several tokens are one
    tokens/s  of all answers, from the first request to the last text
    all       tokens/s while every user is receiving an answer: the prompts have been computed, and no answer has ended yet
    MBU       bytes of weights, keys and values that these tokens need, per second, of what a copy moves per second

Both give the same answers, because a row's tokens do not depend on others. With the model of a run an answer ends where the model ends
it; one with random weights (--depth) always writes --answer tokens.
"""

import asyncio
import gc
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated

import h11
import numpy as np
import torch
import tyro
from rich.table import Table

from bench.engine import bytes_of_token
from bench.measure import header, peaks
from bench.random_run import run_to_measure
from nanochat.checkpoint import find_checkpoint, load_model
from nanochat.gpt import GPT
from nanochat.inference.engine import Engine
from nanochat.inference.session import events, shown
from nanochat.options.ranges import AtLeast, check_ranges
from nanochat.platform.console import say, show_table
from nanochat.platform.distributed import start_runtime
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json
from nanochat.platform.paths import Paths
from nanochat.synthetic import world
from nanochat.tokenizer.bpe import Tokenizer
from nanochat.tokenizer.chat_format import render_prompt

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ServerConfig:
    """Time `nanochat web` with many users at once, beside the engine alone."""

    run_name: str = "cpu"
    """run whose fine-tuned model is served"""
    depth: Annotated[int, AtLeast(0)] = 0
    """blocks of a model with random weights that is served in place of the run's; 0: the run's"""
    vocab_size: int = 65536
    """size of the vocabulary of the model with random weights"""
    users: tuple[int, ...] = (1, 8, 64, 256)
    """users who ask at the same time"""
    prompt: Annotated[int, AtLeast(1)] = 256
    """tokens of each prompt, about"""
    answer: Annotated[int, AtLeast(2)] = 256
    """maximum tokens of each answer"""
    turns: Annotated[int, AtLeast(1)] = 3
    """rounds for each number of users, after one that is not counted"""
    rows: Annotated[int, AtLeast(1)] = 256
    """answers that are generated at the same time; those of more users wait"""
    temperature: float = 0.8
    """temperature of the sampling"""
    top_k: int = 50
    """tokens to sample from"""
    device: str = "auto"
    """cuda, cpu or auto"""
    json: Path | None = None
    """file for the results"""


@dataclass
class Answer:
    """When a request was sent and when each piece of its answer came, in seconds; how many tokens both have; and the text."""

    asked: float
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0


def questions(tokenizer: Tokenizer, seed: str, users: int, tokens: int) -> list[str]:
    """Texts of about so many tokens. They differ from the first words on, so that no prompt is cached."""
    rng, words = random.Random(seed), world.words(1, 2000)
    return [tokenizer.decode(tokenizer.encode(" ".join(rng.choices(words, k=tokens)))[:tokens]) for _ in range(users)]


# ---------------------------------------------------------------------------------------------------------------------
# The server and its users


@contextmanager
def running_server(paths: Paths, config: ServerConfig) -> Iterator[int]:
    """Give the block the port of a `nanochat web`, which ends after it. Raises UserError if it does not start."""
    options = {
        "run-name": paths.run_name, "port": 0, "device": config.device, "gpus": 1, "rows": config.rows,
        "queue": max(config.users),
    }  # fmt: skip
    command = [sys.executable, "-m", "nanochat", "web"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    env = os.environ | {"NANOCHAT_BASE_DIR": str(paths.base)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    try:
        found = next(filter(None, (re.search(r"http://[^:]+:(\d+)", line) for line in process.stdout)), None)
        if found is None:
            raise UserError(f"nanochat web ended with status {process.wait()} before it served; its message is above")
        yield int(found[1])
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Exchange(asyncio.Protocol):
    """A request, and what came of its answer when. It is read after the round, so that reading costs no time of others."""

    def __init__(self, port: int, body: dict):
        data = json.dumps(body).encode()
        headers = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json", "Content-Length": str(len(data))}
        self.parser = h11.Connection(h11.CLIENT)
        request = h11.Request(
            method="POST", target="/v1/chat/completions", headers=[*headers.items(), ("Connection", "close")]
        )
        self.request = b"".join(map(self.parser.send, (request, h11.Data(data=data), h11.EndOfMessage())))
        self.asked, self.pieces, self.ended = 0.0, [], asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.asked = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(None)

    def content(self) -> Iterator[tuple[float, bytes]]:
        """The pieces of the body. Raises UserError for an error of the server, and for an answer that breaks off."""
        status, body = 0, b""
        try:
            for at, data in [*self.pieces, (0.0, b"")]:
                self.parser.receive_data(data)
                while (event := self.parser.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                    if isinstance(event, h11.Response):
                        status = event.status_code
                    elif isinstance(event, h11.Data):
                        body += event.data
                        if status == 200:
                            yield at, bytes(event.data)
                    elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                        break
        except h11.RemoteProtocolError as error:
            raise UserError(
                f"the server broke off an answer after {len(body):,} bytes ({error}); see its message above"
            )
        if status != 200:
            raise UserError(f"the server answered with status {status}: {body.decode(errors='replace')}")

    def answer(self) -> Answer:
        """What the events of the answer say."""
        found, unread = Answer(self.asked), b""
        for at, data in self.content():
            *whole, unread = (unread + data).split(b"\n\n")
            for event in whole:
                if event == b"data: [DONE]":
                    continue
                event = json.loads(event.removeprefix(b"data: "))
                if "error" in event:
                    raise UserError(f"the server broke off an answer: {event['error']['message']}")
                if event["usage"]:
                    found.prompt_tokens = event["usage"]["prompt_tokens"]
                    found.tokens = event["usage"]["completion_tokens"]
                if event["choices"] and (text := event["choices"][0]["delta"].get("content")):
                    found.arrivals.append(at)
                    found.text += text
        return found


async def ask_server(port: int, texts: list[str], config: ServerConfig) -> list[Answer]:
    """The answers to users who ask at the same moment."""
    common = {
        "max_tokens": config.answer, "temperature": config.temperature, "top_k": config.top_k,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    exchanges = [
        Exchange(port, {"messages": [{"role": "user", "content": text}], "seed": seed} | common)
        for seed, text in enumerate(texts)
    ]
    loop = asyncio.get_running_loop()
    await asyncio.gather(*(loop.create_connection(lambda e=e: e, "127.0.0.1", port) for e in exchanges))
    await asyncio.gather(*(exchange.ended for exchange in exchanges))
    return [exchange.answer() for exchange in exchanges]


def ask_engine(engine: Engine, texts: list[str], config: ServerConfig) -> list[Answer]:
    """The answers of the engine alone."""
    conversations = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    prompts = [render_prompt(engine.tokenizer, conversation) for conversation in conversations]
    asked, tokens = time.perf_counter(), [[] for _ in prompts]
    rows = [
        engine.row(prompt, config.answer, config.temperature, config.top_k, seed) for seed, prompt in enumerate(prompts)
    ]
    answers = [Answer(asked, prompt_tokens=len(prompt)) for prompt in prompts]
    engine.add(rows)
    while engine.busy:
        engine.step()
        now = time.perf_counter()
        for row, answer, found in zip(rows, answers, tokens, strict=True):
            answer.arrivals += [now] * len(row.output)
            found += [token.token for token in row.output]
            row.output.clear()
    for answer, found in zip(answers, tokens, strict=True):
        answer.tokens, answer.text = len(found), "".join(shown(events(engine.tokenizer, iter(found))))
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# What is told


def numbers_of(rounds: list[list[Answer]], model: GPT, config: ServerConfig, copy_rate: float) -> dict:
    """The numbers of some rounds: times in ms, means of tokens, and rates, whose median over the rounds is taken."""
    answers = [answer for answered in rounds for answer in answered if answer.arrivals]
    users = len(rounds[0])
    if not answers:
        raise UserError("no answer has text: the model of the run ends all of them at once; train it longer")
    firsts = [1e3 * (answer.arrivals[0] - answer.asked) for answer in answers]
    between = 1e3 * np.concatenate([np.diff(answer.arrivals) for answer in answers])
    row = {"users": users}
    for name, values in (("first_ms", firsts), ("token_ms", between)):
        p50, p99 = np.percentile(values, [50, 99]).tolist() if len(values) else (None, None)
        row |= {name: {"p50": p50, "p99": p99, "mean": float(np.mean(values)) if len(values) else None}}
    prompt, tokens = (float(np.mean([getattr(a, name) for a in answers])) for name in ("prompt_tokens", "tokens"))
    rates = [rate for answered in rounds if users <= config.rows and (rate := rate_of_all(answered))]
    together = median(rates) if rates else None
    moved = bytes_of_token(model, users, prompt + tokens / 2) / users
    return row | {
        "prompt_tokens": prompt,
        "answer_tokens": tokens,
        "tokens_per_second": median(map(rate_of_round, rounds)),
        "tokens_per_second_all": together,
        "mbu": together and together * moved / copy_rate,
    }


def rate_of_round(answers: list[Answer]) -> float:
    """Tokens per second from the first request to the last text; 0 without any text."""
    arrivals = [at for answer in answers for at in answer.arrivals]
    seconds = max(arrivals, default=float("inf")) - min(answer.asked for answer in answers)
    return sum(answer.tokens for answer in answers) / seconds


def rate_of_all(answers: list[Answer]) -> float | None:
    """Tokens per second while every user is receiving an answer; None if there is no such time."""
    if not all(answer.arrivals for answer in answers):
        return None
    start, end = max(answer.arrivals[0] for answer in answers), min(answer.arrivals[-1] for answer in answers)
    shares = [sum(start < at <= end for at in a.arrivals) / len(a.arrivals) for a in answers]
    count = sum(share * a.tokens for share, a in zip(shares, answers, strict=True))
    return count / (end - start) if count else None


def table_of(rows: list[dict]) -> Table:
    table = Table(box=None)
    names = ("users", "", "first p50", "p99 ms", "token p50", "p99 ms", "tokens/s", "all", "MBU", "answer")
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        times = [row[name][part] for name in ("first_ms", "token_ms") for part in ("p50", "p99")]
        table.add_row(
            str(row["users"]),
            row["way"],
            *("" if ms is None else f"{ms:,.2f}" for ms in times),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second_all']:,.0f}" if row["tokens_per_second_all"] else "",
            f"{row['mbu']:.1%}" if row["mbu"] else "",
            f"{row['answer_tokens']:,.1f} tokens",
        )
    return table


def measure(paths: Paths, config: ServerConfig, found: dict) -> None:
    """Add the rows of the server and of the engine to what was found, and print them."""
    with start_runtime(config.device) as runtime:
        copy_rate = found["copy_bytes_per_second"] = peaks(runtime.device)[0]
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()  # the server needs the memory
        _, tokenizer, _ = find_checkpoint(paths, "sft", runtime)
        gc.freeze()  # a collection that looks through all of torch would stop the users
        asked = {
            users: [questions(tokenizer, f"{users} {turn}", users, config.prompt) for turn in range(config.turns + 1)]
            for users in config.users
        }
        served: dict[int, list[list[Answer]]] = {users: [] for users in config.users}
        started = time.perf_counter()
        with running_server(paths, config) as port:
            found["seconds_until_served"] = time.perf_counter() - started
            say(f"the server serves after {found['seconds_until_served']:.1f} s")
            for users, turns in asked.items():
                for texts in turns:
                    served[users].append(asyncio.run(ask_server(port, texts, config)))
                say(f"server, {users} users: {rate_of_round(served[users][-1]):,.0f} tokens/s in the last round")
        model, _, _ = load_model(paths, "sft", runtime)
        engine = Engine(model, tokenizer, rows=config.rows, frozen=True)
        engine.decoder.prepare(config.rows, config.top_k)  # as the server does
        for users, turns in asked.items():
            with ThreadPoolExecutor(
                1
            ) as pool:  # as a server's worker, not in the main thread, whose OpenMP threads spin
                alone = list(pool.map(lambda texts: ask_engine(engine, texts, config), turns))
            pairs = [pair for both in zip(served[users], alone, strict=True) for pair in zip(*both, strict=True)]
            same = sum(a.text == b.text and a.tokens == b.tokens for a, b in pairs) / len(pairs)
            rows = [
                {"way": way, "same_answers": same} | numbers_of(rounds[1:], model, config, copy_rate)
                for way, rounds in (("server", served[users]), ("engine", alone))
            ]
            show_table(table_of(rows))
            if same < 1:
                say(f"{1 - same:.1%} of the answers differ between the server and the engine")
            found["rows"] += rows
            if config.json:  # after each number of users, so that an interrupted run keeps its results
                write_json(config.json, found)


def main(config: ServerConfig) -> None:
    check_ranges(config)
    if min(config.users, default=0) < 1:
        raise UserError(f"--users takes numbers from 1 on, got {' '.join(map(str, config.users)) or 'none'}")
    on_gpu = config.device in ("auto", "cuda") and torch.cuda.is_available()
    found = header(f"python -m bench.server {' '.join(sys.argv[1:])}".strip(), on_gpu)
    with run_to_measure(config.run_name, config.depth, config.vocab_size) as paths:
        measure(paths, config, found)


if __name__ == "__main__":
    try:
        main(tyro.cli(ServerConfig))
    except UserError as error:
        sys.exit(f"bench.server: {error}")
