"""What a run has reached, and how long the rest takes."""

import json
import re

import pytest

from nanochat.cli import main, parse
from nanochat.options.train import TrainBaseOptions, TrainMidOptions, TrainSftOptions
from nanochat.platform.paths import Paths
from nanochat.report.sections import read_section
from nanochat.train.finetune import finetune
from nanochat.train.metrics import read_metrics
from nanochat.train.midtrain import midtrain
from nanochat.train.plan import Plan
from nanochat.train.pretrain import pretrain
from nanochat.train.state import Pace, TrainState
from tests.conftest import TINY_BASE, TINY_MID, TINY_SFT


def test_the_number_that_is_printed_is_the_loss_of_the_step(base, monkeypatch, capsys):
    """And the share of the learning rate is not called one."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr("nanochat.platform.console.LINE_SECONDS", 0.0)
    main(["train", "base", *TINY_BASE, "--num-iterations", "8"])
    said = re.findall(r"^train base: step (\d+)/8 \| loss ([\d.]+) \| .*$", capsys.readouterr().out, re.MULTILINE)
    records = read_metrics(Paths(base).metrics("base"), "loss")
    assert said == [(str(record["step"]), f"{record['loss']:.4f}") for record in records] and len(said) == 8
    section = read_section(Paths(base), "base")
    assert section["results"]["loss"] == records[-1]["loss"]


def test_a_checkpoint_gives_the_state_back():
    state = TrainState()
    state.advance(4.0, tokens=10, seconds=0.5, position=(3, 1))
    meta = json.loads(json.dumps({"step": state.step, **state.to_meta([state.position])}))
    again = TrainState.from_meta(meta)
    del meta["loss"]  # as in a checkpoint of an earlier version
    assert TrainState.from_meta(meta).loss is None
    assert meta["positions"] == [[3, 1]] and again.loss == state.loss
    assert (again.step, again.tokens, again.elapsed) == (1, 10, 0.5)


def test_the_first_steps_say_nothing_of_the_time_that_is_left():
    pace = Pace()
    assert [pace.remaining(30.0, done) for done in (0.1, 0.2, 0.3)] == [None, None, None]
    assert pace.remaining(1.0, 0.4) == pytest.approx(6.0)


def test_muons_momentum_rises_in_base_and_mid_and_not_in_sft(trained_base, cpu, monkeypatch):
    momenta = {}

    class Noted(Exception):
        pass

    def note(plan: Plan, *_):
        momenta[plan.stage] = [round(plan.momentum(step), 3) for step in (0, 150, 300)]
        raise Noted

    for stage, train, options in (
        ("pretrain", pretrain, parse(TrainBaseOptions, "train base", TINY_BASE)),
        ("midtrain", midtrain, parse(TrainMidOptions, "train mid", TINY_MID)),
        ("finetune", finetune, parse(TrainSftOptions, "train sft", TINY_SFT)),
    ):
        monkeypatch.setattr(f"nanochat.train.{stage}.Trainer", note)
        with pytest.raises(Noted):
            train(options, Paths(trained_base), cpu)
    rising = [0.85, 0.9, 0.95]
    assert momenta == {"base": rising, "mid": rising, "sft": [0.95] * 3}
