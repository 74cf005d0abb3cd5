"""Training ends when it is asked to, and keeps going when nobody reads what it says; nothing that it has done is lost."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from nanochat.checkpoint import CheckpointStore
from nanochat.cli import main
from nanochat.platform.paths import Paths
from nanochat.platform.signals import handled
from nanochat.train.metrics import read_metrics
from nanochat.train.trainer import Trainer
from tests import forked
from tests.conftest import TINY_BASE, assert_fails_with, command, environment, nanochat
from tests.nanochat.train.test_resume import losses, start, wait_for, weights


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_the_same_command_resumes(base, trained_base, number, status):
    arguments = ["train", "base", *TINY_BASE, "--save-every", "0"]
    process, metrics = start(base, *arguments), Paths(base).metrics("base")
    assert wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 4, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert len(err.strip().splitlines()) == 1 and "everything is saved" in err and "Traceback" not in out + err
    stopped = int(next(Paths(base).checkpoints("base").glob("step_*")).name[-6:])
    assert 0 < stopped < 24
    saved = json.loads((Paths(base).checkpoints("base") / f"step_{stopped:06d}" / "meta.json").read_text())
    assert saved["seconds"] > saved["elapsed"] > 0, "with the evaluation at step 0"
    result = nanochat(base, *arguments)
    section = json.loads(Paths(base).section("base").read_text())
    assert section["results"]["earlier_seconds"] == saved["seconds"], "the report counts all starts"
    assert section["seconds"] > saved["seconds"] + section["results"]["train_seconds"] - saved["elapsed"]
    assert result.returncode == 0 and f"resuming base at step {stopped}" in result.stdout
    assert losses(base) == losses(trained_base) and weights(base) == weights(trained_base)


def test_each_start_trains_a_step_though_it_is_to_stop_before(base, trained_base):
    """So that a job that is queued again and again comes to its end."""
    paths, metrics = Paths(base), Paths(base).metrics("base")
    paths.stop.touch()
    for step in (1, 2):
        done = nanochat(base, "train", "base", *TINY_BASE)
        assert_fails_with(
            done, f"stopped at step {step} by the file", f"everything is saved in {paths.checkpoints('base')}"
        )
        assert not [r for r in read_metrics(metrics) if "evaluate_s" in r], "and it measures nothing before"
        assert len(read_metrics(metrics, "loss")) == step
    paths.stop.unlink()
    assert nanochat(base, "train", "base", *TINY_BASE).returncode == 0
    assert losses(base) == losses(trained_base) and weights(base) == weights(trained_base)
    paths.stop.touch()  # there is no step to train
    assert_fails_with(nanochat(base, "train", "base", *TINY_BASE), "stopped at step 24 by the file")


SLOW_CORE = """
import sys, time
from nanochat.cli import main
from nanochat.train import pretrain
pretrain.evaluate_core = lambda *_: time.sleep(1000)
main(sys.argv[1:])
"""


@pytest.mark.parametrize("saved", [False, True])
def test_a_signal_ends_an_evaluation_at_once(base, saved):
    """One that takes long, before the first step or after a save: nothing that training has done is lost."""
    options = ["--core-metric-every", "4"] if saved else ["--eval-tokens", str(10**9)]
    process = forked.start("-c", SLOW_CORE, "train", "base", *TINY_BASE, *options, env=environment(base))
    metrics, steps = Paths(base).metrics("base"), Paths(base).checkpoints("base")
    assert wait_for(lambda: any(steps.glob("step_*")) if saved else metrics.exists(), process)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 143 and len(err.strip().splitlines()) == 1, err
    assert (
        "at step 4 by SIGTERM; everything is saved in" if saved else "at step 0 by SIGTERM; nothing had to be saved"
    ) in err


def test_ctrl_c_in_a_terminal_saves_though_torchrun_passes_it_on_once_more(base):
    arguments = [
        "train",
        "base",
        *TINY_BASE,
        "--device-batch-size",
        "2",
        "--num-iterations",
        "100000",
        "--save-every",
        "0",
    ]
    process = subprocess.Popen(
        command(*arguments, processes=2), env=environment(base), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = Paths(base).metrics("base")
    assert wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 4, process)
    os.killpg(process.pid, signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert "by SIGINT; everything is saved in" in err and any(Paths(base).checkpoints("base").glob("step_*")), err


def test_a_second_signal_ends_the_process_whatever_a_thread_does(tmp_path):
    """The loader spins, and the main thread waits for it."""
    script = """
import signal, sys, time
from nanochat.data.batches import prefetched
from nanochat.train.trainer import Interrupt
def spin():
    while True:
        time.sleep(0.01)
    yield
interrupt = Interrupt()
with interrupt.handling():
    print("ready", flush=True)
    with prefetched(spin()) as batches:
        next(batches)
"""
    process = subprocess.Popen([sys.executable, "-c", script], env=environment(None), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGTERM, signal.SIGTERM):  # as torchrun passes on what a terminal has sent: one request
        process.send_signal(number)
        time.sleep(0.2)
    assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert process.stdout.read().splitlines() == [
        "SIGTERM received: finishing this step, then saving (again: ending at once)",
        "SIGTERM received again: ending at once, without saving",
    ]


def test_a_signal_that_was_to_be_ignored_stays_ignored():
    """As SIGHUP under nohup."""
    received, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled(lambda number, frame: received.append(number)):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert received == [signal.SIGUSR1] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("closed", [False, True])
def test_output_that_nobody_reads_changes_nothing(base, trained_base, closed):
    """As with `| head`: a pipe whose reader has ended. Or standard output is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    shell = ["sh", "-c", 'exec "$@" >&-', "sh"] if closed else []
    done = subprocess.run(
        [*shell, *command("train", "base", *TINY_BASE)],
        env=environment(base),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.returncode == 0
    assert done.stderr == ("" if closed else "nanochat: cannot write the output (Broken pipe); the work goes on\n")
    assert losses(base) == losses(trained_base) and weights(base) == weights(trained_base)


def test_a_base_directory_that_vanishes_ends_training_with_an_error(base):
    """Between two heartbeats of the lock, and before the end."""
    process, metrics = start(base, "train", "base", *TINY_BASE, "--save-every", "0"), Paths(base).metrics("base")
    assert wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 4, process)
    shutil.rmtree(base)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in out + err
    assert err.startswith("nanochat: error: ") and "was removed" in err, err


def test_training_that_can_write_nothing_saves_and_ends(base, trained_base, monkeypatch, capsys):
    """A full disk behind the log and behind the metrics, from step 5 on; a full disk behind one of them ends nothing."""

    class Full(io.StringIO):
        def flush(self):
            if self.full():
                raise OSError(errno.ENOSPC, "No space left on device")

    class FullFile(Full):
        def write(self, line):
            self.flush()
            return len(line)

    after, report = {"log": 3, "metrics": 5}, Trainer._report
    log, reached = Full(), []

    def reporting(trainer, *given):
        reached.append(trainer.state.step)
        trainer.metrics._file = FullFile()
        trainer.metrics._file.full = lambda: len(reached) >= after["metrics"]
        return report(trainer, *given)

    log.full = lambda: len(reached) >= after["log"]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit) as ended,
        pytest.warns(UserWarning, match="cannot write"),
        pytest.warns(UserWarning, match="base.jsonl lacks the last 1 records"),
    ):
        patch.setattr(sys, "stdout", log)
        patch.setattr(Trainer, "_report", reporting)
        patch.setattr("nanochat.platform.console.LINE_SECONDS", 0.0)
        main(["train", "base", *TINY_BASE])
    assert ended.value.code == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nanochat")]
    assert told[0] == "nanochat: cannot write the output (No space left on device); the work goes on"
    assert "stopped at step 5 by output that cannot be written" in told[1] and "everything is saved in" in told[1]
    assert nanochat(base, "train", "base", *TINY_BASE).returncode == 0 and weights(base) == weights(trained_base)


@pytest.mark.parametrize(("stops", "shorts"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (2.0, 2.0)])
def test_one_of_two_ranks_stops_or_ends_both(stops, shorts):
    """And the progress in the data is the mean of theirs."""
    runtime = SimpleNamespace(primary=False, world_size=2, sum=lambda _: [stops, shorts, 12.0, 0.5])
    trainer = SimpleNamespace(
        runtime=runtime, plan=SimpleNamespace(accumulation=1), interrupt=SimpleNamespace(received=None)
    )
    assert Trainer._agree(trainer, []) == (stops > 0, shorts > 0, 12.0, 0.25)


def test_waiting_for_data_and_for_other_ranks_is_part_of_a_step(base, monkeypatch):
    """And what is not, is told beside it."""
    agree, save = Trainer._agree, CheckpointStore.save
    monkeypatch.setattr(Trainer, "_agree", lambda *given: time.sleep(0.05) or agree(*given))
    monkeypatch.setattr(CheckpointStore, "save", lambda *given: time.sleep(0.1) or save(*given))
    monkeypatch.setattr("nanochat.train.pretrain.bits_per_byte", lambda *_: time.sleep(0.2) or 1.0)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    main(["train", "base", *TINY_BASE, "--num-iterations", "3", "--save-every", "2", "--eval-every", "100"])
    records = read_metrics(Paths(base).metrics("base"))
    steps, others = [r for r in records if "dt" in r], [r for r in records if "dt" not in r]
    assert all(0.05 <= r["data_s"] < r["dt"] for r in steps) and steps[0]["log_s"] == 0 < steps[1]["log_s"]
    assert [(r["step"], r.keys() - {"step"}) for r in others] == [
        (0, {"val_bpb", "evaluate_s"}),
        (2, {"save_s"}),
        (3, {"save_s"}),
        (3, {"val_bpb", "evaluate_s"}),
    ]
    assert all(r.get("save_s", 0.1) >= 0.1 and r.get("evaluate_s", 0.2) >= 0.2 for r in others)
    main(["train", "base", *TINY_BASE, "--num-iterations", "3", "--save-every", "2", "--eval-every", "100"])
    again = read_metrics(Paths(base).metrics("base"))
    assert [r.keys() for r in again] == [r.keys() for r in records], "nothing was saved again"
    assert [r for r in again if "save_s" in r] == [r for r in records if "save_s" in r]
