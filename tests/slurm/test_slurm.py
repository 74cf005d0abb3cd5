"""Real jobs on a real Slurm of one node: the time limit, cancellation and kills lose nothing but the steps since a save."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.options.presets import PRESETS
from nanochat.platform.paths import Paths
from nanochat.train.metrics import read_metrics
from tests.conftest import environment

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SITE = str(HERE / "local.env")
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


class Run:
    """A base directory whose run is submitted, again and again."""

    def __init__(self, slurm: dict, base: Path, *options: str, preset: str = "tiny"):
        self.paths, self.options, self.preset = Paths(base), options, preset
        self.env = environment(base, **slurm, NANOCHAT_VENV=sys.prefix)
        self.held: dict[tuple[str, str], float] = {}

    def slurm(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, env=self.env, timeout=30).stdout.strip()

    def submit(self) -> None:
        command = [
            sys.executable,
            "-m",
            "nanochat",
            "cluster",
            "submit",
            "speedrun",
            "--preset",
            self.preset,
            "--site",
            SITE,
        ]
        done = subprocess.run([*command, *self.options], capture_output=True, text=True, env=self.env, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        self.job = json.loads(self.paths.jobs.read_text().splitlines()[-1])["id"]

    def state(self) -> tuple[str, int]:
        """Slurm's word for it, and how often the job was queued again. Slurm holds such a job back for two minutes, until what
        the start before left is surely gone; here some seconds will do."""
        shown = dict(
            pair.partition("=")[::2]
            for pair in self.slurm("scontrol", "show", "job", "-o", self.job).split()
            if "=" in pair
        )
        if shown["JobState"] == "PENDING" and shown["Restarts"] != "0":
            held = self.held.setdefault((self.job, shown["Restarts"]), time.monotonic())
            if time.monotonic() - held > 10:
                self.slurm("scontrol", "update", f"JobId={self.job}", "StartTime=now")
        return shown["JobState"], int(shown["Restarts"])

    def wait(self, until) -> None:
        end = time.monotonic() + 500
        while not until():
            assert time.monotonic() < end, f"{self.state()}\n{self.log()[-3000:]}"
            time.sleep(0.2)

    def trained(self, stage: str, steps: int) -> bool:
        return len(read_metrics(self.paths.metrics(stage))) > steps

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.paths.logs.glob("*.log")))

    def end(self, *states: str) -> str:
        self.wait(lambda: self.state()[0] in states)
        return self.state()[0]

    def losses(self, *stages: str) -> dict:
        return {s: [(m["step"], m["loss"]) for m in read_metrics(self.paths.metrics(s)) if "loss" in m] for s in stages}


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def preset(pytestconfig) -> str:
    return pytestconfig.getoption("--slurm-preset")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, slurm, preset) -> Run:
    run = Run(slurm, tmp_path_factory.mktemp("uninterrupted"))
    command = [sys.executable, "-m", "nanochat", "speedrun", "--preset", preset]
    done = subprocess.run(command, capture_output=True, text=True, env=run.env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return run


def test_a_run_survives_time_limits_cancellation_and_kills(slurm, preset, uninterrupted, tmp_path):
    """Queued again twice by the time limit, cancelled once, killed once: the losses are the uninterrupted run's."""
    # Slurm looks every 30 s: the signal comes 5 to 35 s after the start, so that two of them are sure to come in time
    run = Run(slurm, tmp_path / "base", "--time=1", "--signal-seconds=25", preset=preset)
    run.submit()
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
    assert run.losses(*stages) == uninterrupted.losses(*stages)
    assert f"preflight of {preset}: all is there" in run.log()
    # where the signals fall is chance; the kill is in the middle of mid
    assert "finished before, skipped" in run.log() and "resuming mid at step" in run.log()
    assert (run.paths.report / "report.html").exists()
    assert not (run.paths.base / "reached_out").exists(), "something looked for the internet"


def test_two_tasks_of_a_node(slurm, tmp_path):
    """A torchrun a task, which meet: killed in the middle and submitted again, the losses are those of a run that was not."""
    runs = [
        Run(slurm, tmp_path / name, "--tasks-per-node=2", "--time=10", "--signal-seconds=30", "--to=base")
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
    assert killed.losses("base") == whole.losses("base") and len(whole.losses("base")["base"]) == 600
    assert "resuming base at step" in killed.log()


def test_status_tells_from_the_files(uninterrupted, preset):
    command = [sys.executable, "-m", "nanochat", "cluster", "status"]
    shown = subprocess.run(command, capture_output=True, text=True, env=uninterrupted.env).stdout
    steps = PRESETS[preset]["train base"]["num_iterations"]
    assert "done in" in shown and str(steps) in shown and "to come" not in shown
