"""What a run has reached, and how long the rest takes."""

import errno
import json
import re
import warnings

import pytest

from nanochat.cli import main, parse
from nanochat.options.train import TrainBaseOptions, TrainMidOptions, TrainSftOptions
from nanochat.platform.paths import Paths
from nanochat.report.sections import read_section
from nanochat.train.finetune import finetune
from nanochat.train.metrics import Metrics, read_metrics
from nanochat.train.midtrain import midtrain
from nanochat.train.plan import Plan
from nanochat.train.pretrain import pretrain
from nanochat.train.state import SHAPE, Pace, TrainState
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


def test_what_is_saved_is_checked_when_it_is_read():
    assert TrainState().to_meta([]).keys() - {"loss"} == SHAPE.keys() - {"settings"}


def test_the_first_steps_say_nothing_of_the_time_that_is_left():
    pace = Pace()
    assert [pace.remaining(30.0, done) for done in (0.1, 0.2, 0.3)] == [None, None, None]
    assert pace.remaining(1.0, 0.4) == pytest.approx(6.0)


def test_metrics_that_a_full_disk_did_not_take_are_written_later(tmp_path):
    """In order, and whole: the disk takes a part of a line before it is full."""
    metrics, taken = Metrics(tmp_path / "base.jsonl"), iter([10**6, 7, None, 0, None, None])
    metrics.open(0, "", "", "base", {})
    disk = metrics._file

    class FullDisk:
        def write(self, line: bytes) -> int:
            size = next(taken, 10**6)
            if size is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return disk.write(line[:size])

        def close(self) -> None:
            disk.close()

    metrics._file = FullDisk()
    for step in range(6):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            metrics.write({"step": step, "loss": step / 3})
        assert [record["step"] for record in read_metrics(metrics.path)] == list(range(1 if 0 < step < 4 else step + 1))
        assert (
            ("No space left on device; training continues" in str(told[0].message)) if told else metrics.error is None
        )
    metrics.close()
    assert [record["loss"] for record in read_metrics(metrics.path)] == [step / 3 for step in range(6)]


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
