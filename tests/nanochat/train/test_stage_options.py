"""Options of the stages: schedules of the learning rate, where a stage begins, and what it measures on the way."""

import json
import shutil

import pytest
import torch

from nanochat.checkpoint import load_model
from nanochat.data.conversations import Limited, Mixture, padded_batches
from nanochat.evaluate.bits_per_byte import mean_loss
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths, steps_in
from nanochat.report.sections import read_section
from nanochat.tasks import SmolTalk
from nanochat.tokenizer.chat_format import render
from nanochat.train.metrics import read_metrics
from nanochat.train.schedules import trapezoid
from tests.conftest import TINY_BASE, TINY_MID, TINY_SFT, assert_fails_with, nanochat


def multipliers(base, stage: str) -> list[float]:
    return [record["lr_multiplier"] for record in read_metrics(Paths(base).metrics(stage), "lr_multiplier")]


def test_the_learning_rate_rises_stays_and_falls():
    schedule = trapezoid(warmup=0.25, warmdown=0.5, final=0.2, step=1 / 8)
    found = [schedule(step / 8) for step in range(8)]
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4])
    assert schedule(1.0) == pytest.approx(0.2)
    assert [trapezoid(0.0, 0.0)(step / 4) for step in range(5)] == [1.0] * 5
    assert [trapezoid(0.0, 1.0)(step / 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert trapezoid(0.75, 0.75)(0.5) == pytest.approx((0.5 / 0.75) ** 2)  # where they overlap, the product


def test_base_and_mid_take_the_learning_rate_of_their_options(base):
    options = "--num-iterations 8 --warmup-ratio 0.25 --warmdown-ratio 0.5 --final-lr-fraction 0.2".split()
    assert nanochat(base, "train", "base", *TINY_BASE, *options).returncode == 0
    assert multipliers(base, "base") == pytest.approx([0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4])
    assert nanochat(base, "train", "mid", *TINY_MID, "--init-lr-fraction", "0.5").returncode == 0
    found = multipliers(base, "mid")
    assert found[0] == 0.5 and max(found) == 0.5 and min(found) < 0.25


def test_epochs_and_steps_are_limited_by_options(base, trained_base):
    for stage in ("base", "mid"):
        shutil.copytree(Paths(trained_base).checkpoints(stage), Paths(base).checkpoints(stage))
    assert nanochat(base, "train", "sft", *TINY_SFT, "--num-epochs", "2").returncode == 0
    assert len(multipliers(base, "sft")) == 15 and len(multipliers(trained_base, "sft")) == 7
    shutil.rmtree(Paths(base).checkpoints("sft"))
    assert nanochat(base, "train", "sft", *TINY_SFT, "--num-iterations", "4").returncode == 0
    assert multipliers(base, "sft") == pytest.approx([0.02 * share for share in (1, 0.75, 0.5, 0.25)])
    shutil.rmtree(Paths(base).checkpoints("mid"))
    assert nanochat(base, "train", "mid", *TINY_MID, "--num-iterations", "5", "--warmdown-ratio", "1").returncode == 0
    assert multipliers(base, "mid") == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert len(multipliers(trained_base, "mid")) > 5


def test_fine_tuning_can_begin_with_the_base_model(base, trained_base):
    shutil.copytree(Paths(trained_base).run / "checkpoints" / "base", Paths(base).run / "checkpoints" / "base")
    arguments = ["train", "sft", *TINY_SFT]
    assert_fails_with(nanochat(base, *arguments), "no checkpoint of mid; there are: base")
    assert nanochat(base, *arguments, "--source", "base").returncode == 0
    shutil.copytree(Paths(trained_base).run / "checkpoints" / "mid", Paths(base).run / "checkpoints" / "mid")
    assert_fails_with(nanochat(base, *arguments), "other settings (", "source")
    first = [read_metrics(Paths(place).metrics("sft"), "loss")[0]["loss"] for place in (base, trained_base)]
    assert first[0] > first[1]  # midtraining has taught what a conversation is


def test_a_run_of_a_version_without_these_options_resumes(trained_base, tmp_path):
    """Its checkpoints do not have them; what they do have is compared."""
    base = shutil.copytree(trained_base, tmp_path / "base")
    for stage, arguments in (("base", TINY_BASE), ("mid", TINY_MID), ("sft", TINY_SFT)):
        for path in steps_in(Paths(base).checkpoints(stage)).values():
            meta = json.loads((path / "meta.json").read_text())
            for name in ("warmup_ratio", "final_lr_fraction", "source", "eval_every", "num_epochs"):
                meta["settings"].pop(name, None)
            if stage == "mid":
                del meta["settings"]["init_lr_fraction"]
            if stage != "base":
                del meta["settings"]["num_iterations"]
            del meta["settings"]["optimizer"]["weight_decay"]
            (path / "meta.json").write_text(json.dumps(meta))
        result = nanochat(base, "train", stage, *arguments)
        assert result.returncode == 0 and f"resuming {stage}" in result.stdout, result.stderr
        other = nanochat(base, "train", stage, *arguments, "--weight-decay", "0.1")
        assert_fails_with(other, "other settings (optimizer)")


def test_fine_tuning_measures_the_loss_and_accuracies(trained_base, cpu, tokenizer):
    paths = Paths(trained_base)
    measured = read_metrics(paths.metrics("sft"), "val_loss")
    assert [record["step"] for record in measured] == [0, 5, 7]
    assert {"ARC-Easy", "MMLU", "val_loss"} <= read_section(paths, "sft")["results"].keys()
    model, _, _ = load_model(paths, "sft", cpu)
    total, count = 0.0, 0
    for index in range(8):
        ids, mask = render(tokenizer, SmolTalk(paths, "test")[index], model.config.context_length + 1)
        log_p = torch.log_softmax(model(torch.tensor([ids[:-1]])), dim=-1)[0]
        chosen = [place for place in range(1, len(ids)) if mask[place]]
        total -= sum(float(log_p[place - 1, ids[place]].detach()) for place in chosen)
        count += len(chosen)
    assert measured[-1]["val_loss"] == pytest.approx(total / count, rel=1e-4)


def test_held_out_conversations_without_an_answer_are_named(trained_base, cpu, tokenizer):
    model, _, _ = load_model(Paths(trained_base), "sft", cpu)
    nothing = padded_batches(Mixture([Limited(SmolTalk(Paths(trained_base), "test"), 0)]), tokenizer, 1, 32)
    with pytest.raises(UserError, match="nothing to measure the loss on.*--eval-rows"):
        mean_loss(model, nothing, cpu)
