"""bench.engine without a GPU: what its numbers count, with stand-ins for a GPU's clock and graphs."""

import time
from json import loads
from types import SimpleNamespace

import pytest
import torch

from bench import engine
from nanochat.gpt import GPTConfig
from nanochat.inference.decoder import Decoder
from nanochat.train.timing import trained_model
from tests import forked
from tests.conftest import environment

CLOCK_MS = 2.0  # of a step, by the stand-in of an event


@pytest.fixture
def results(monkeypatch):
    """Rows of results of two variants, and the runs that made them. The host sleeps 5 ms before each token."""
    runs, made, decode = [], engine.Run.__init__, Decoder.decode

    def watched(run, *arguments):
        made(run, *arguments)
        runs.append(run)

    def slow(decoder, *arguments):
        time.sleep(0.005)
        return decode(decoder, *arguments)

    monkeypatch.setattr(engine.Run, "__init__", watched)
    monkeypatch.setattr(Decoder, "decode", slow)
    monkeypatch.setattr(engine, "Graph", lambda run: run, raising=False)
    monkeypatch.setattr(
        engine, "interleaved", lambda runs, rounds: {name: [run(0).item()] for name, run in runs.items()}
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    config = engine.EngineConfig(
        cached=20, steps=4, turns=1, vocab_size=64, variants=("eager:reference", "replay:reference")
    )
    with torch.inference_mode():
        model = trained_model(GPTConfig(1, 32, 1, 1, 64, 64), torch.device("cpu"), torch.float32)
        return engine.measure(model, 2, config, 1e9), runs


class Event(SimpleNamespace):
    """The time between two events is that of the steps between them: what the host does is not counted."""

    def record(self) -> None:
        pass

    def elapsed_time(self, end) -> float:
        return 4 * CLOCK_MS


def test_time_of_the_gpu_is_without_the_host(results):
    rows, _ = results
    for row in rows:
        assert row["gpu_ms"] == CLOCK_MS and min(row["token_ms"]) >= 5, row


def test_the_slowest_tokens_are_told(results, capsys):
    rows, _ = results
    engine.report(rows)
    printed = capsys.readouterr().out
    for row in rows:
        assert row["token_ms_p50"] <= row["token_ms_p99"] <= max(row["token_ms"])
        assert f"p99 {row['token_ms_p99']:.3f})" in printed
        assert row["forward_ms"] > 1 and f"({row['first_ms'][0] / row['forward_ms']:.2f} × forward)" in printed


def test_a_forward_pass_has_as_many_tokens(monkeypatch):
    """A part of the rows, and its time as often as it takes."""
    shapes = []
    block = SimpleNamespace(attention=SimpleNamespace(config="of another variant"))
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=9), device="cpu", blocks=[block])
    monkeypatch.setattr(engine, "Graph", lambda run: run)
    monkeypatch.setattr(engine, "interleaved", lambda runs, _: {name: [run(0), 1.0, 9.0] for name, run in runs.items()})
    run = type("Model", (SimpleNamespace,), {"__call__": lambda _, given, targets: shapes.append(given.shape) or 2.0})
    for rows, ms in ((4, 2.0), (16, 2.0), (24, 3.0), (64, 8.0)):
        assert engine.forward_ms(run(**vars(model)), rows, 20) == ms
    assert shapes == [(4, 20), (16, 20), (16, 20), (16, 20)] and block.attention.config is model.config


def test_headline_numbers(results):
    """Tokens of all rows per second; and the bytes of weights, keys and values per second, as a part of the 1e9 of a copy.

    They are float32. The model has a block, 32 channels, a head and a vocabulary of 64; 2 rows have 22 tokens cached on average.
    """
    rows, _ = results
    matrices = 12 * 32 * 32 + 64 * 32  # of the block, and the head; the embedding is not read
    keys_and_values = 2 * (2 * 22 * 32)
    for row in rows:
        seconds = row["token_ms_p50"] / 1000
        assert row["tokens_per_second"] == pytest.approx(2 / seconds)
        assert row["mbu"] == pytest.approx(4 * (matrices + keys_and_values) / seconds / 1e9)


def test_bytes_of_a_token_with_shared_heads():
    """Two key heads of 16 channels serve four query heads, in bfloat16."""
    config = GPTConfig(3, 64, 4, 2, 128)
    model = SimpleNamespace(config=config, compute_dtype=torch.bfloat16)
    block = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 2 * 4 * 64 * 64
    assert engine.bytes_of_token(model, 5, 100) == 2 * (3 * block + 128 * 64 + 3 * 2 * (5 * 100 * 2 * 16))


def test_more_rows_than_a_pass_has_take_several(results):
    """The kernels of a step are those of all its passes."""
    _, runs = results
    run, most = runs[0], runs[0].decoder.size_for(1000, "rows")
    for rows, passes in ((most, 1), (most + 1, 2), (3 * most, 3)):
        run.rows = rows
        with torch.inference_mode():
            assert run.gpu() == passes * CLOCK_MS


def test_variants_share_one_cache(results):
    """At 256 rows of d20 one takes 55 GB."""
    _, runs = results
    assert len(runs) == 2 and len({run.decoder.cache.keys.data_ptr() for run in runs}) == 1
    assert runs[0].decoder.cache.pages.count == 2 * runs[0].pages


def test_users_and_an_evaluation_of_a_run(trained_base, tmp_path):
    arguments = "--measure users evaluation --run-name default --users 1 3 --answer 4 --items 5 --turns 1 --device cpu"
    json = tmp_path / "engine.json"
    done = forked.run("-m", "bench.engine", *arguments.split(), "--json", str(json), env=environment(trained_base))
    assert done.returncode == 0, done.stderr
    found = loads(json.read_text("utf-8"))
    assert [row["users"] for row in found["users"]] == [1, 3] and all(row["together"][0] > 0 for row in found["users"])
    assert [row["way"] for row in found["evaluation"]] == ["at once", "in batches", "one at a time"]
    assert "3 users" in done.stdout and "5 word problems at once" in done.stdout
