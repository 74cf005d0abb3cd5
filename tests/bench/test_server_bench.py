"""bench.server and bench.reinforce on a CPU: what they run is what users and training run, and their numbers count what they say."""

import asyncio
import gc
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from rich.table import Table

from bench import server
from bench.random_run import random_run
from nanochat.checkpoint import load_model
from nanochat.gpt import GPTConfig
from nanochat.inference.engine import Engine
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.tasks import GSM8K
from nanochat.tokenizer.chat_format import render_prompt
from tests import forked
from tests.conftest import environment

CPU = Runtime(0, 1, torch.device("cpu"), torch.float32)


def bench(name: str, arguments: str, base, json_file) -> tuple[dict, str]:
    """The results and the output of a benchmark."""
    done = forked.run(
        "-m", f"bench.{name}", *arguments.split(), "--device", "cpu", "--json", str(json_file), env=environment(base)
    )
    assert done.returncode == 0, done.stderr
    return json.loads(json_file.read_text("utf-8")), done.stdout


def test_users_of_a_server_get_the_answers_of_the_engine(tmp_path):
    arguments = "--depth 1 --vocab-size 300 --users 1 2 --prompt 20 --answer 6 --turns 2 --rows 2"
    found, printed = bench("server", arguments, tmp_path, tmp_path / "server.json")
    assert [(row["users"], row["way"]) for row in found["rows"]] == [
        (users, way) for users in (1, 2) for way in ("server", "engine")
    ]
    for row in found["rows"]:
        assert row["same_answers"] == 1 and row["answer_tokens"] == 6 and 20 <= row["prompt_tokens"] <= 28, row
        assert 0 <= row["token_ms"]["p50"] <= row["token_ms"]["p99"] and row["first_ms"]["p50"] > 0, row
        assert row["tokens_per_second"] > 0, row
        assert row["way"] == "server" or 0 < row["mbu"] < 1, (
            row
        )  # pieces may all arrive together where others use the cores
    assert "server, 2 users" in printed and "tokens/s" in printed
    assert not list(tmp_path.glob("runs"))  # the run was a temporary one


def test_a_run_is_served_and_trained(trained_base, tmp_path):
    found, _ = bench(
        "server", "--run-name default --users 3 --prompt 5 --answer 4 --turns 1", trained_base, tmp_path / "a.json"
    )
    assert [row["same_answers"] for row in found["rows"]] == [1, 1]
    before = sorted(trained_base.rglob("*"))
    found, printed = bench("reinforce", "--run-name default --preset tiny --steps 2", trained_base, tmp_path / "b.json")
    assert sorted(trained_base.rglob("*")) == before
    assert [row["step"] for row in found["rows"]] == [1, 2]  # step 0 compiles
    for row in found["rows"]:
        assert row["samples"] == 8 * 4 and 0 < row["answer_tokens"] <= 32 and 0 < row["sampling_s"] < row["step_s"], row
    rates = found["samples_per_second"]
    assert 0 < rates["step"] < rates["sampling"] and "samples/s while sampling" in printed


def test_the_first_round_is_not_counted(monkeypatch):
    counted = []

    def ask(texts: list[str]) -> list[server.Answer]:
        return [server.Answer(0.0, [1.0], text, 1, 1) for text in texts]

    async def ask_server(port, texts, config):
        return ask(texts)

    def numbers_of(rounds, *_):
        counted.append([answer.text for answers in rounds for answer in answers])
        return {}

    fakes = {
        "running_server": lambda *_: nullcontext(0),
        "ask_server": ask_server,
        "ask_engine": lambda engine, texts, config: ask(texts),
        "questions": lambda tokenizer, seed, users, tokens: [seed] * users,
        "numbers_of": numbers_of,
        "table_of": lambda rows: Table(),
        "peaks": lambda device: (1e9, 1e12),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(server, name, fake)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    with random_run(1, 320) as paths:
        server.measure(paths, server.ServerConfig(users=(1,), turns=2, device="cpu"), {"rows": []})
    assert counted == [["1 1", "1 2"]] * 2  # of the server and of the engine, without "1 0"


def test_answers_of_random_weights_have_all_their_tokens():
    with random_run(1, 320) as paths, torch.inference_mode():
        model, tokenizer, _ = load_model(paths, "sft", CPU)
        assert tokenizer.vocab_size == model.config.vocab_size == 320
        prompts = [render_prompt(tokenizer, GSM8K(paths, "train")[number]) for number in range(4)]
        answers = Engine(model, tokenizer).generate(prompts, 50, top_k=50)
        assert [len(answer) for answer in answers] == [50] * 4
        assert max(map(max, answers)) < len(tokenizer.ranks)
    assert not paths.base.exists()


def test_the_vocabulary_is_filled_with_what_no_prompt_has():
    with random_run(1, 5000) as paths:
        tokenizer = load_model(paths, "sft", CPU)[1]
    assert tokenizer.vocab_size == 5000 and len(set(tokenizer.ranks)) == 4991
    text = " 00003 and 00004"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and max(ids) < 1024
    assert tokenizer.decode([4990]).isascii()


def answered(asked: float, *arrivals: float) -> server.Answer:
    return server.Answer(asked, list(arrivals), "text", 10, len(arrivals))


def test_numbers_of_a_round():
    """Two users; the second's first text comes at 2 s, the first's last text at 4 s: 5 pieces come in these two seconds."""
    answers = [answered(0.0, 1.0, 2.0, 3.0, 4.0), answered(0.5, 2.0, 2.5, 3.5, 4.0, 6.0)]
    config = GPTConfig.from_depth(1, 64, 64)
    model = SimpleNamespace(config=config, compute_dtype=torch.float32)
    row = server.numbers_of([answers], model, server.ServerConfig(), 1e9)
    assert row["users"] == 2 and row["first_ms"] == {"p50": 1250, "p99": pytest.approx(1495), "mean": 1250}
    assert row["token_ms"]["p50"] == 1000 and row["token_ms"]["p99"] == pytest.approx(1960, rel=0.02)
    assert row["tokens_per_second"] == 9 / 6 and row["tokens_per_second_all"] == 5 / 2
    matrices = config.num_parameters - 64 * config.width
    cached = 2 * (10 + 4.5 / 2) * config.width  # keys and values of one row in the middle of its answer
    assert row["mbu"] == pytest.approx(2.5 * 4 * (matrices / 2 + cached) / 1e9)
    waiting = server.numbers_of([answers], model, server.ServerConfig(rows=1), 1e9)
    assert waiting["tokens_per_second_all"] is None and waiting["mbu"] is None


def exchange(*pieces: bytes) -> server.Exchange:
    async def make() -> server.Exchange:
        return server.Exchange(1, {})

    made = asyncio.run(make())
    made.pieces = list(enumerate(pieces))
    return made


def test_an_answer_is_read_by_the_times_of_its_pieces():
    def event(text: str, usage: dict | None = None) -> bytes:
        choices = [] if usage else [{"delta": {"content": text}}]
        return b"data: " + json.dumps({"choices": choices, "usage": usage}).encode() + b"\n\n"

    usage = event("", {"prompt_tokens": 7, "completion_tokens": 3})
    body = [event(""), event("a")[:9], event("a")[9:] + event("b"), event("c") + usage + b"data: [DONE]\n\n"]
    chunks = [b"%x\r\n%s\r\n" % (len(data), data) for data in body]
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    found = exchange(head, *chunks, b"0\r\n\r\n").answer()
    assert (found.text, found.arrivals, found.prompt_tokens, found.tokens) == ("abc", [3, 3, 4], 7, 3)
    with pytest.raises(UserError, match="broke off an answer after"):
        exchange(head, *chunks).answer()
    with pytest.raises(UserError, match="status 429: later"):
        exchange(b"HTTP/1.1 429 Too Many\r\ncontent-length: 5\r\n\r\nlater").answer()
    failed = b'data: {"error": {"message": "the engine failed"}}\n\n'
    with pytest.raises(UserError, match="the engine failed"):
        exchange(head, b"%x\r\n%s\r\n0\r\n\r\n" % (len(failed), failed)).answer()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--users 0", "--users takes numbers from 1 on, got 0"),
        ("--answer 1", "--answer must be at least 2, got 1"),
        ("--run-name nobody", "no checkpoint of sft"),
        ("--depth 1 --vocab-size 300 --users 1 --turns 1 --prompt 9000", "there may be 8,000"),
    ],
)
def test_what_cannot_be_measured_is_told(arguments, message, tmp_path):
    done = forked.run("-m", "bench.server", *arguments.split(), "--device", "cpu", env=environment(tmp_path))
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("bench.server: ")
    assert message in done.stderr


def test_a_server_that_does_not_start_is_told(tmp_path):
    paths = Paths(tmp_path).of_run("nobody")
    with (
        pytest.raises(UserError, match="nanochat web ended with status 1 before it served"),
        server.running_server(paths, server.ServerConfig(device="cpu")),
    ):
        pass
