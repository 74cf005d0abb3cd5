"""Real jobs on a real Slurm of one node: the time limit, cancellation and kills lose nothing but the steps since a save."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from nanochat.options.presets import PRESETS
from tests.slurm.run import ENDED, HERE, ROOT, Run

pytestmark = pytest.mark.skipif(
    shutil.which("slurmctld") is None or os.geteuid() != 0,
    reason="needs Slurm and root: apt-get install slurm-wlm munge",
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([HERE / "local_slurm.sh", "start", folder], check=True, timeout=60)
    yield {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(HERE / "offline")}
    subprocess.run([HERE / "local_slurm.sh", "stop", folder], check=True, timeout=60)


@pytest.fixture(scope="module")
def preset(pytestconfig) -> str:
    return pytestconfig.getoption("--slurm-preset")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, slurm, preset):
    """A function that waits for an uninterrupted run and returns it. The run is started here and computes while a test runs: each has
    one thread."""
    run = Run(slurm, tmp_path_factory.mktemp("uninterrupted"), preset=preset)
    command = [sys.executable, "-m", "nanochat", "speedrun", "--preset", preset]
    log = run.paths.base / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=run.env, cwd=ROOT)

    def finished() -> Run:
        assert process.wait() == 0, log.read_text()[-3000:]
        return run

    yield finished
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def requeued(tmp_path_factory, slurm) -> Run:
    """A run up to the end of its first training, which gets the signal of the time limit in the middle."""
    # 150 steps, not the 600 of the preset: each takes a tenth of a second
    options = ("--time=10", "--signal-seconds=30", "--to=base")
    run = Run(slurm | {"TINY_STEPS": "150"}, tmp_path_factory.mktemp("requeued"), *options)
    run.submit()
    run.wait(lambda: run.trained("base", 60) or run.state()[0] in ENDED)
    run.slurm("scancel", "--signal=USR1", "--batch", run.job)
    assert run.end(*ENDED) == "COMPLETED", run.log()[-3000:]
    return run


@pytest.mark.long
def test_a_requeued_run_resumes_at_the_step_at_which_it_stopped(requeued):
    log = requeued.log()
    assert requeued.state() == ("COMPLETED", 1) and log.count("USR1 received before the time limit") == 1
    (stopped,) = set(re.findall(r"training base stopped at step (\d+)", log))
    assert re.findall(r"resuming base at step (\d+)", log) == [stopped]
    assert [step for step, _ in requeued.losses("base")["base"]] == list(range(150))


@pytest.mark.long
def test_status_of_a_part(requeued):
    shown = status(requeued)
    assert "done in" in shown and "150" in shown and "to come" in shown


def test_a_job_that_can_never_start_says_why(slurm, tmp_path):
    run = Run(slurm, tmp_path / "100%x of mine", "--nodes=2", "--time=10", "--signal-seconds=30")
    run.submit()
    run.wait(lambda: "never starts" in status(run))
    shown = status(run)
    assert f"job {run.job} nanochat-speedrun: PENDING" in shown and "lower --nodes; cancel it with: scancel" in shown
    run.slurm("scancel", run.job)


@pytest.mark.long
def test_a_run_survives_time_limits_cancellation_and_kills(slurm, preset, uninterrupted, tmp_path):
    """Queued again twice by the time limit, cancelled once, killed once: the losses are the uninterrupted run's."""
    # Slurm looks every 30 s: the signal comes 5 to 35 s after the start, so that two of them are sure to come in time
    run = Run(slurm, tmp_path / "base", "--time=4", "--signal-seconds=25", preset=preset)
    run.submit()
    run.slurm(
        "scontrol", "update", f"JobId={run.job}", "TimeLimit=1"
    )  # which submit refuses: it leaves no time to start
    run.wait(lambda: run.state() == ("RUNNING", 2) and "start 3" in run.log())
    run.slurm("scancel", run.job)
    assert run.end(*ENDED) == "CANCELLED"
    log = run.log()
    assert log.count("USR1 received before the time limit") == 2
    assert not (run.paths.records / "report.json").exists()

    run.options = ("--time=10", "--signal-seconds=30")
    run.submit()
    run.wait(lambda: run.trained("mid", 22))  # two steps behind a save
    run.slurm("scancel", "--signal=KILL", "--full", run.job)
    assert run.end(*ENDED) in ("FAILED", "CANCELLED")

    run.submit()
    assert run.end(*ENDED) == "COMPLETED", run.log()[-3000:]
    stages = ("base", "mid", "sft")
    assert run.losses(*stages) == uninterrupted().losses(*stages)
    assert f"preflight of {preset}: everything is there" in run.log()
    # where the signals fall is chance; the kill is in the middle of mid
    assert "finished before, skipped" in run.log() and "resuming mid at step" in run.log()
    assert (run.paths.report / "report.html").exists()
    assert not (run.paths.base / "reached_out").exists(), "something looked for the internet"


@pytest.mark.long
def test_two_tasks_of_a_node(slurm, tmp_path):
    """One torchrun per task, joined in one run. Killed in the middle and submitted again, it has the losses of an uninterrupted run."""
    runs = [
        Run(
            slurm | {"TINY_STEPS": "150"},
            tmp_path / name,
            "--tasks-per-node=2",
            "--time=10",
            "--signal-seconds=30",
            "--to=base",
        )
        for name in ("killed", "whole")
    ]
    killed, whole = runs
    killed.submit()
    killed.wait(lambda: killed.trained("base", 60))
    killed.slurm("scancel", "--signal=KILL", "--full", killed.job)
    assert killed.end(*ENDED) in ("FAILED", "CANCELLED")
    for run in runs:
        run.submit()
        assert run.end(*ENDED) == "COMPLETED", run.log()[-3000:]
    assert json.loads(killed.paths.section("base").read_text())["processes"] == 2
    assert killed.losses("base") == whole.losses("base") and len(whole.losses("base")["base"]) == 150
    assert "resuming base at step" in killed.log()


def status(run: Run) -> str:
    command = [sys.executable, "-m", "nanochat", "cluster", "status"]
    return subprocess.run(command, capture_output=True, text=True, env=run.env).stdout


@pytest.mark.long
def test_status_of_the_whole(uninterrupted, preset):
    shown, steps = status(uninterrupted()), PRESETS[preset]["train base"]["num_iterations"]
    assert "done in" in shown and str(steps) in shown and "to come" not in shown
