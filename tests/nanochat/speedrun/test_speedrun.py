"""The speedrun: stages once each, in order, resumed, and stopped by the first that fails. Run with tiny settings."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat.options import presets
from nanochat.options.evaluate import SAMPLE_PROMPTS
from nanochat.options.speedrun import SpeedrunOptions
from nanochat.platform.errors import TrainingStopped, UserError
from nanochat.platform.lock import locked
from nanochat.platform.paths import Paths
from nanochat.report.sections import read_samples
from nanochat.speedrun.run import run_stages
from nanochat.speedrun.stages import NAMES, STAGES, Stage
from tests import forked
from tests.conftest import (
    TINY_BASE,
    TINY_EVALUATE_BASE,
    TINY_EVALUATE_CHAT,
    TINY_MID,
    TINY_SFT,
    assert_fails_with,
    environment,
    nanochat,
)

TINY = {
    "data": (*"data generate --shards 2 --documents 1100 --chats 60 --questions 60 --problems 40 --identity 10".split(),
             *"--words 200 --tests 16".split()),
    "tokenizer": ("tokenizer", "train", "--vocab-size", "512"),
    "base": ("train", "base", *TINY_BASE),
    "base-eval": ("evaluate", "base", *TINY_EVALUATE_BASE),
    "mid": ("train", "mid", *TINY_MID),
    "mid-eval": ("evaluate", "chat", "--stage", "mid", *TINY_EVALUATE_CHAT),
    "sft": ("train", "sft", *TINY_SFT),
    "sft-eval": ("evaluate", "chat", "--stage", "sft", *TINY_EVALUATE_CHAT),
    "rl": (*"train rl --gsm8k 16 --examples-per-step 4 --num-samples 2 --max-tokens 8 --eval-every -1".split(),
           *"--save-every 3 --device cpu".split()),
    "rl-eval": ("evaluate", "chat", "--stage", "rl", *TINY_EVALUATE_CHAT),
}  # fmt: skip


USUAL = tuple(stage.name for stage in STAGES if not stage.optional)  # stages of a run for which nobody asked for more
TINY_STAGES = tuple(replace(s, command=TINY.get(s.name, s.command), has_preset=False) for s in STAGES)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A base directory of its own, for every stage's real command at a tiny size."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr("nanochat.speedrun.run.subprocess.Popen", start_stage)
    return Paths(tmp_path)


def run(options: SpeedrunOptions, paths: Paths, stages: tuple[Stage, ...] = TINY_STAGES) -> None:
    run_stages(options, paths, stages)


def start_stage(command: list[str], **options) -> forked.Forked | subprocess.Popen:
    """In place of Popen for a whole run: a stage as a fork. Tests of stages that fail or are stopped start processes."""
    return forked.start(*command[1:], env=environment(Path(os.environ["NANOCHAT_BASE_DIR"])))


def files(paths: Paths) -> dict:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths.base.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def up_to_base(tmp_path_factory) -> Path:
    """A base directory in which the stages up to pretraining are finished; copy it before writing to it."""
    base = tmp_path_factory.mktemp("up_to_base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        patch.setattr("nanochat.speedrun.run.subprocess.Popen", start_stage)
        run(SpeedrunOptions(last="base"), Paths(base))
    return base


@pytest.fixture(scope="module")
def finished(up_to_base, tmp_path_factory) -> Path:
    """A base directory in which all stages are finished, by a run that resumes after pretraining; copy it before writing to it."""
    base = shutil.copytree(up_to_base, tmp_path_factory.mktemp("finished") / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        patch.setattr("nanochat.speedrun.run.subprocess.Popen", start_stage)
        run(SpeedrunOptions(), Paths(base))
    return base


def copied(source: Path, paths: Paths) -> None:
    """Fill a base directory with the files of another one."""
    shutil.copytree(source, paths.base, dirs_exist_ok=True)


def test_a_damaged_or_missing_input_stops_later_stages(up_to_base, tiny):
    copied(up_to_base, tiny)
    shard = tiny.text / "shard_00001.parquet"
    content, record = shard.read_bytes(), (tiny.records / "data.json").read_bytes()
    shard.write_bytes(content[:-50])
    with pytest.raises(UserError, match="of it have changed since: .*/shard_00001.parquet; to keep .* --changed keep"):
        run(SpeedrunOptions(first="mid"), tiny)
    shard.write_bytes(content)
    (tiny.tokenizer / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="stage tokenizer has not finished"):
        run(SpeedrunOptions(first="mid"), tiny)
    assert (tiny.records / "data.json").read_bytes() == record and not tiny.checkpoints("mid").exists()


def test_no_stage_starts_after_one_that_failed(up_to_base, tiny):
    copied(up_to_base, tiny)
    (tiny.chat_data / "gsm8k" / "train.parquet").unlink()
    with pytest.raises(UserError, match="stage data has not finished|stage mid failed with exit status 1"):
        run(SpeedrunOptions(first="mid"), tiny)
    assert not tiny.checkpoints("mid").exists() and not tiny.checkpoints("sft").exists()


def test_a_whole_run_records_every_stage_and_writes_the_report(finished):
    paths = Paths(finished)
    assert sorted(p.stem for p in paths.records.glob("*.json")) == sorted(USUAL)
    for name in USUAL:
        made = json.loads((paths.records / f"{name}.json").read_text())
        assert made["made"] and all(len(digest) == 64 for digest in made["made"].values()) and made["seconds"] > 0
    report = (paths.report / "report.md").read_text()
    assert "has not run" not in report and "| ARC-Easy stand-in | 0.2500 |" in report
    assert read_samples(paths)[0] == ("you", SAMPLE_PROMPTS[0]) and f"**you:** {SAMPLE_PROMPTS[0]}" in report
    html = (paths.report / "report.html").read_text()
    # without the pictures, because four letters of base64 may spell anything
    page, pictures = re.subn(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "", html)
    assert pictures == 6 and "http" not in page


def test_repeating_a_finished_run_changes_nothing(finished, tiny, capfd):
    copied(finished, tiny)
    before = files(tiny)
    capfd.readouterr()
    run(SpeedrunOptions(), tiny)
    assert files(tiny) == before
    assert capfd.readouterr().out.count("finished before, skipped") == len(USUAL)


def test_reinforcement_learning_joins_a_finished_run_when_it_is_asked_for(finished, tiny, capfd):
    copied(finished, tiny)
    with pytest.raises(UserError, match="--to rl: this stage runs only with --rl; add it"):
        run(SpeedrunOptions(last="rl"), tiny)
    run(SpeedrunOptions(rl=True), tiny)
    out = capfd.readouterr().out
    assert "sft-eval: finished before" in out and "rl: done" in out and "rl-eval: done" in out and "report: done" in out
    assert sorted(p.stem for p in tiny.records.glob("*.json")) == sorted(NAMES)
    assert "Evaluation after reinforcement learning" in (tiny.report / "report.md").read_text()
    run(SpeedrunOptions(rl=True), tiny)
    assert capfd.readouterr().out.count("finished before, skipped") == len(NAMES)


def test_a_removed_checkpoint_reruns_its_stage_and_none_before_it(finished, tiny, capfd):
    copied(finished, tiny)
    before = files(tiny)
    shutil.rmtree(tiny.checkpoints("sft"))
    run(SpeedrunOptions(), tiny)
    out = capfd.readouterr().out
    assert "sft: done" in out and "mid: finished before" in out
    assert files(tiny).keys() == before.keys()


def test_a_stage_that_fails_gives_its_status_and_cause(tiny):
    stages = (Stage("tokenizer", ("tokenizer", "train"), lambda p: [p.tokenizer / "tokenizer.json"], has_preset=False),)
    with pytest.raises(
        UserError, match=r"stage tokenizer failed with exit status 1 \(.*0 parquet shards.*run the same command"
    ) as e:
        run(SpeedrunOptions(first="tokenizer", last="tokenizer"), tiny, stages)
    assert e.value.exit_status == 1 and not tiny.records.exists()


@pytest.mark.parametrize("broken", NAMES)
def test_after_a_stage_that_fails_none_starts_and_nothing_says_success(broken, tmp_path, monkeypatch, capfd):
    started = []

    def popen(command, **options):
        words = " ".join(command)
        name = next(stage.name for stage in STAGES if " ".join(stage.command) in words)
        started.append(name)
        return real(["sh", "-c", "echo it broke >&2; exit 7" if name == broken else "true"], **options)

    real = subprocess.Popen
    monkeypatch.setattr("nanochat.speedrun.run.subprocess.Popen", popen)
    with pytest.raises(
        UserError, match=f"stage {broken} failed with exit status 7 .it broke.*same command again"
    ) as error:
        run(SpeedrunOptions(device="cpu", rl=True), Paths(tmp_path), STAGES)
    assert error.value.exit_status == 7 and started == list(NAMES[: NAMES.index(broken) + 1])
    assert sorted(p.stem for p in (Paths(tmp_path).run / "records").glob("*")) == sorted(NAMES[: NAMES.index(broken)])
    assert "all stages" not in capfd.readouterr().out


@pytest.mark.parametrize(("broken_off", "script"), [
    ("tokenizer", "exec sleep 60"),  # ended at once
    (
        "base",  # asked through a file; torchrun, if it is told too, leaves time to save
        '[ "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" -ge 600 ] || exit 0; '
        'while [ ! -e "$NANOCHAT_BASE_DIR/runs/default/stop" ]; do sleep 0.1; done; exit 9',
    ),
])  # fmt: skip
def test_a_signal_stops_the_stage_under_way(broken_off, script, tmp_path, monkeypatch):
    def popen(command, **options):
        words = " ".join(command)
        if " ".join(next(stage for stage in STAGES if stage.name == broken_off).command) in words:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            return real(["sh", "-c", script], **options)
        return real(["true"], **options)

    real = subprocess.Popen
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr("nanochat.speedrun.run.subprocess.Popen", popen)
    started = time.monotonic()
    with pytest.raises(TrainingStopped, match=f"stopped by SIGUSR1 in stage {broken_off}") as error:
        run(SpeedrunOptions(device="cpu"), Paths(tmp_path), STAGES)
    assert error.value.exit_status == 128 + signal.SIGUSR1 and time.monotonic() - started < 20
    assert not Paths(tmp_path).stop.exists() and not (Paths(tmp_path).run / "records" / f"{broken_off}.json").exists()


def test_training_saves_and_ends_where_the_stop_file_lies(base):
    paths = Paths(base)
    paths.stop.touch()
    stopped = nanochat(base, "train", "base", *TINY_BASE)
    assert stopped.returncode == 128 + signal.SIGUSR1 and f"by the file {paths.stop}" in stopped.stderr
    assert (paths.checkpoints("base") / "step_000001" / "meta.json").exists()


def test_by_default_every_stage_runs():
    assert (SpeedrunOptions().first, SpeedrunOptions().last) == (NAMES[0], NAMES[-1])


def test_one_speedrun_at_a_time(tiny):
    with locked(tiny.lock("speedrun"), "speedrun"), pytest.raises(UserError, match="another speedrun is running"):
        run(SpeedrunOptions(), tiny)


def test_a_lock_that_a_stage_waits_for_is_not_reported_as_another_speedrun(tmp_path, monkeypatch):
    def other_lock(*arguments):
        with locked(tmp_path / "other.lock", "thing"):
            pass

    monkeypatch.setattr("nanochat.speedrun.run.valid_record", other_lock)
    with locked(tmp_path / "other.lock", "thing"), pytest.raises(UserError, match="another thing is running"):
        run(SpeedrunOptions(), Paths(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # released


STARTED = """
import os, pathlib, sys
from nanochat.options.speedrun import SpeedrunOptions
from nanochat.platform.paths import Paths
from nanochat.speedrun.run import run_stages
from nanochat.speedrun.stages import Stage
base = Paths(pathlib.Path(os.environ["NANOCHAT_BASE_DIR"]))
run_stages(SpeedrunOptions(last="base", device="cpu"), base, [
    Stage("base", tuple(sys.argv[1:]), lambda paths: [paths.checkpoints("base")], has_preset=False, trains=True)
])
"""


@contextmanager
def training_under_way(base: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """A speedrun of one training stage, and the process of the stage, which has done some steps. Neither is there afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED, "train", "base", *TINY_BASE, "--num-iterations", "100000", "--save-every", "0"],
        env=environment(base), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    metrics, lock = Paths(base).metrics("base"), Paths(base).lock("base")
    try:
        until(lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 3))
        assert process.poll() is None, process.communicate()[0]
        yield process, json.loads(lock.read_text())["process"]
    finally:
        with suppress(
            ProcessLookupError
        ):  # the session of the two, as their parent's end would only ask the stage to end
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)


def test_a_stage_saves_and_ends_when_its_speedrun_is_killed(base):
    with training_under_way(base) as (speedrun, stage):
        second = nanochat(base, "train", "base", *TINY_BASE)  # while the first one trains
        assert_fails_with(
            second, f"another train base is running in {Paths(base).run} (process {stage} on", "remove", "base.lock"
        )
        speedrun.kill()
        speedrun.wait()
        until(lambda: not Paths(base).lock("base").exists())
    assert list(Paths(base).checkpoints("base").glob("step_*"))
    with locked(Paths(base).lock("speedrun"), "speedrun"):  # that of the killed process counts no more
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_a_speedrun_gives_what_the_stage_said(base, number):
    with training_under_way(base) as (speedrun, stage):
        if number == signal.SIGINT:  # as a terminal sends it: to both
            os.kill(stage, number)
        speedrun.send_signal(number)
        said = speedrun.communicate(timeout=60)[0]
    assert speedrun.returncode and f"stopped by {number.name} in stage base: training base stopped at step" in said
    assert said.count("everything is saved in") == 2 and "fix the cause" not in said, said


def test_every_preset_names_commands_that_exist():
    from nanochat.cli import COMMANDS

    for commands in presets.PRESETS.values():
        assert set(commands) <= set(COMMANDS)
    for stage in STAGES:
        assert " ".join(stage.command[:2]) in COMMANDS or stage.command[0] in COMMANDS
