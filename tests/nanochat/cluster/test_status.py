"""`cluster status` says what runs, what has stopped and where, how the run goes on, and why a job never starts."""

import json
import os
import shutil
import threading
import time
from dataclasses import replace

import pytest

from nanochat.cluster.status import status
from nanochat.options.cluster import StatusOptions
from nanochat.platform.errors import UserError
from nanochat.platform.lock import locked
from nanochat.platform.paths import Paths
from nanochat.report.sections import write_section
from nanochat.speedrun.records import write_record
from nanochat.speedrun.stages import STAGES

BY_NAME = {stage.name: stage for stage in STAGES}


@pytest.fixture
def paths(tmp_path):
    """A run whose tokenizer is finished and whose pretraining came to step 23, with a checkpoint of step 20."""
    paths = Paths(tmp_path / "base", "mine")
    for name in ("tokenizer", "tokenizer-eval"):
        write_record(paths, BY_NAME[name], [], "", 2.0)
    (paths.checkpoints("base") / "step_000020").mkdir(parents=True)
    (paths.checkpoints("base") / "step_000020" / "meta.json").touch()
    train(paths, "base", 23)
    return paths


def train(paths: Paths, stage: str, steps: int) -> None:
    paths.metrics(stage).parent.mkdir(exist_ok=True)
    record = {"loss": 2.0, "tokens_per_second": 10.0, "remaining": 90.0}
    paths.metrics(stage).write_text("".join(json.dumps({"step": step, **record}) + "\n" for step in range(steps)))


@pytest.fixture
def shown(paths, capsys, monkeypatch, tmp_path):
    """What status says: a function of the lines that squeue prints."""

    def of(*queue: str) -> str:
        (tmp_path / "bin").mkdir(exist_ok=True)
        lines = "".join(f"{line}\n" for line in queue)
        (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\ncat <<'E'\n{lines}E\n")
        (tmp_path / "bin" / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        status(StatusOptions(), paths)
        return capsys.readouterr().out

    return of


def row(shown: str, stage: str) -> str:
    return next(line for line in shown.splitlines() if line.split()[:1] == [stage])


def note(paths: Paths, *jobs: dict) -> None:
    paths.jobs.write_text("".join(json.dumps(job) + "\n" for job in jobs))


def test_a_stage_whose_process_was_killed_has_stopped(paths, shown):
    """At once, though its metrics have a line of this second."""
    told = shown()
    assert row(told, "base").split() == ["base", "stopped", "23", "2.0000", "10"]
    assert "stage base has stopped at step 23; the same command again resumes it at step 20\n" in told
    assert "to come" in row(told, "mid") and "running" not in told and "left" in told


def test_a_stage_runs_while_it_holds_its_lock(paths, shown):
    os.utime(paths.metrics("base"), (0, 0))  # a step or an evaluation that takes long
    with locked(paths.lock("base"), "train base"):
        told = shown()
    assert row(told, "base").split() == ["base", "running", "23", "2.0000", "10", "1", "min", "30", "s"]
    assert f"stage base is running: process {os.getpid()} on" in told and "stopped" not in told


@pytest.mark.parametrize("remaining", ["null", '"soon"'])
def test_the_time_that_is_left_may_not_be_known(paths, shown, remaining):
    paths.metrics("base").write_text(paths.metrics("base").read_text().replace("90.0", remaining))
    with locked(paths.lock("base"), "train base"):
        assert "not known yet" in row(shown(), "base")


def test_a_stage_without_metrics_runs_too(paths, shown):
    write_record(paths, BY_NAME["base"], [], "", 9.0)
    with locked(paths.lock("base-eval"), "evaluate base"):
        told = shown()
    assert row(told, "base-eval").split() == ["base-eval", "running"] and "done in 9 s" in row(told, "base")


@pytest.mark.parametrize(("age", "state"), [(20, "running"), (100, "stopped")])
def test_a_holder_on_another_node_is_known_by_its_heartbeat(paths, shown, age, state, monkeypatch):
    monkeypatch.setattr("nanochat.platform.lock.BEAT", 0.05)
    holder = {"host": "gpu07", "namespace": "", "process": 7, "started": "1", "job": "41", "since": "12:00"}
    for name in ("base", "mid-eval"):
        paths.lock(name).write_text(json.dumps(holder))
        os.utime(paths.lock(name), (time.time() - age,) * 2)
    told = shown()
    assert state in row(told, "base") and state in row(told, "mid-eval")
    assert ("process 7 on gpu07, job 41, since 12:00" in told) == (state == "running")


@pytest.mark.parametrize("hours", [-2, 2])
@pytest.mark.parametrize("alive", [True, False])
def test_the_clock_of_another_node_may_differ(paths, shown, monkeypatch, hours, alive):
    monkeypatch.setattr("nanochat.platform.lock.BEAT", 0.5)
    holder = {"host": "gpu07", "namespace": "", "process": 7, "started": "1", "job": "41", "since": "12:00"}
    paths.lock("base").write_text(json.dumps(holder))
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            os.utime(paths.lock("base"), (time.time() + 3600 * hours,) * 2)

    os.utime(paths.lock("base"), (time.time() + 3600 * hours,) * 2)
    other = threading.Thread(target=beat)
    if alive:
        other.start()
    try:
        assert ("running" if alive else "stopped") in row(shown(), "base")
    finally:
        ended.set()
        if alive:
            other.join()


def test_a_stage_that_was_run_by_itself_is_done_until_it_is_trained_again(paths, shown):
    write_section(paths, "base", {}, {"steps": 23}, 75.0, 1)
    assert "done in 1 min 15 s" in row(shown(), "base")
    train(paths, "base", 12)
    assert "stopped" in row(shown(), "base")


def test_the_next_stage_is_that_after_the_last_one(paths, shown):
    """Also of a run whose stages were begun by hand, in which those before it have left nothing."""
    write_section(paths, "base", {}, {"steps": 23}, 75.0, 1)
    assert "stage base-eval has not started; the same command again starts it\n" in shown()
    write_record(paths, BY_NAME["report"], [], "", 1.0)
    assert "the same command again" not in shown()


def test_generated_data_are_a_stage_only_of_a_run_that_has_them(paths, shown):
    assert "data" not in [line.split()[0] for line in shown().splitlines() if line.split()]
    paths.embedded.mkdir()
    assert "data" in [line.split()[0] for line in shown().splitlines() if line.split()]


def test_a_queued_job_goes_on_with_the_stage(paths, shown):
    note(paths, {"id": "41", "run": "mine"})
    told = shown("41|nanochat-speedrun|PENDING|0:00|1:00:00|BeginTime")
    assert "stage base has stopped at step 23; job 41 (pending) resumes it at step 20" in told
    told = shown("41|nanochat-speedrun|CANCELLED|0:40|1:00:00|None")
    assert "the same command again resumes it" in told and f"its output: {paths.logs}/nanochat-speedrun-41.log" in told


def test_only_the_jobs_of_the_run_are_shown(paths, shown, tmp_path):
    """Jobs that were noted by earlier versions have a preset in place of a run."""
    note(
        paths,
        {"id": "40", "run": "other"},
        {"id": "41", "run": "mine"},
        {"id": "42", "preset": "mine"},
        {"id": "43", "preset": "d20"},
    )
    with paths.jobs.open("a") as jobs:
        jobs.write('{"id": "44", "run": "mi')  # a kill has cut it off
    shown()
    assert (tmp_path / "asked").read_text().split()[-1] == "--jobs=41,42"
    paths.run.rename(tmp_path / "elsewhere")  # as while the first job of the first run waits
    shown()
    assert (tmp_path / "asked").read_text().split()[-1] == "--jobs=40,41,42,43"


@pytest.mark.parametrize(
    ("state", "reason", "advice"),
    [
        (
            "PENDING",
            "PartitionConfig",
            "the partition has fewer nodes than it asks for; lower --nodes; cancel it with: scancel 41",
        ),
        ("PENDING", "PartitionNodeLimit", "the partition has fewer nodes than it asks for; lower --nodes"),
        ("PENDING", "AssocMaxNodePerJobLimit", "its account or QOS may not have so many nodes; lower --nodes"),
        ("PENDING", "PartitionTimeLimit", "lower --time or NANOCHAT_TIME"),
        ("PENDING", "QOSMaxWallDurationPerJobLimit", "lower --time or NANOCHAT_TIME"),
        ("PENDING", "AssocMaxMemPerJob", "lower --gpus, or NANOCHAT_CPUS and NANOCHAT_MEMORY"),
        (
            "FAILED",
            "BadConstraints",
            "lower --gpus, or NANOCHAT_CPUS and NANOCHAT_MEMORY in the site profile; submit again",
        ),
        ("PENDING", "DependencyNeverSatisfied", "the job that it waits for has failed"),
        ("PENDING", "InvalidAccount", "name another with --account"),
        ("PENDING", "JobHeldUser", "it is held; let it go with: scontrol release 41"),
        ("PENDING", "Priority", ""),
        ("PENDING", "Resources", ""),
        ("RUNNING", "None", ""),
    ],
)
def test_a_job_that_never_starts_says_why(paths, shown, state, reason, advice):
    note(paths, {"id": "41", "run": "mine"})
    told = shown(f"41|nanochat-speedrun|{state}|0:00|1:00:00|{reason}")
    assert advice in told and f"{state}, 0:00 of 1:00:00, {reason}" in told
    never = bool(advice) and "held" not in advice
    assert ("it never starts" in told) == never and ("the same command again" in told) == never


def test_a_stage_whose_checkpoints_were_removed_is_not_done(paths, shown):
    for name in ("base", "base-eval", "mid", "mid-eval", "report"):
        write_record(paths, BY_NAME[name], [], "", 2.0)
    for stage in ("base", "mid"):
        shutil.rmtree(paths.checkpoints(stage), ignore_errors=True)
    paths.metrics("base").unlink()
    for stage in ("base", "base-eval", "mid", "mid-eval"):
        assert "to come" in row(shown(), stage)
    assert "stage base has not started; the same command again starts it" in shown()


def test_a_mistyped_run_is_none(paths):
    with pytest.raises(UserError, match="there is no run typo in .*; this is about the run typo, other runs: mine"):
        status(StatusOptions(), replace(paths, run_name="typo"))
