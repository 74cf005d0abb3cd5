"""What failures cost a run on a Slurm of this machine: python -m tests.slurm.measure_failures build/failures.json [stage …] (as root)

Each failure in the middle of each stage that trains, and a kill in one that evaluates; the row of the JSON tells how many
steps had to be done again, how long the run took to end, and how long from its next start until it was as far again.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanochat.train.metrics import read_metrics
from tests.processes import workers
from tests.slurm.run import ENDED, HERE, ROOT, Run

SAVE_EVERY = 20  # of the preset tiny
MIDDLE = {"base": 70, "mid": 30, "sft": 10}  # stage → at which step of it
BEFORE = {
    "base": "tokenizer-eval",
    "mid": "base-eval",
    "mid-eval": "mid",
    "sft": "mid-eval",
}  # stage → what is done before
TIMEOUT = 8  # seconds after which a process counts as lost
IN_JOBS = {
    "USR1": ("scancel", "--signal=USR1", "--batch"),
    "scancel": ("scancel",),
    "SIGKILL of the job": ("scancel", "--signal=KILL", "--full"),
}
IN_PROCESSES = {
    "SIGSTOP of one process of two": (signal.SIGSTOP, "one"),
    "SIGKILL of one process of two": (signal.SIGKILL, "one"),
    "SIGKILL of every process, as when a node dies": (signal.SIGKILL, "all"),
}


class Measured(Run):
    """A run that begins with one stage, after those of a prepared one."""

    def __init__(self, slurm: dict, prepared: Path, base: Path, stage: str):
        shutil.copytree(prepared, base)
        super().__init__(slurm, base, "--time=10", "--signal-seconds=30", f"--to={stage}")
        self.stage = stage

    def steps(self) -> int:
        return len([m for m in read_metrics(self.paths.metrics(self.stage)) if "loss" in m])

    def resumed_at(self) -> int:
        found = re.findall(rf"resuming {self.stage} at step (\d+)", self.log())
        return int(found[-1]) if found else 0

    def row(self, failure: str, before: int, ended: float, started: float) -> dict:
        """before: steps in the metrics after the failure; ended: seconds until all processes were gone; started: when the run was
        begun again."""
        self.wait(lambda: self.steps() > before)
        back = time.monotonic() - started
        times = {"seconds_to_end": ended, "seconds_back": back}
        found = {
            "failure": failure,
            "stage": self.stage,
            "at_step": before,
            "steps_lost": before - self.resumed_at(),
        } | times
        print(json.dumps(found), flush=True)
        return found


def in_a_job(run: Measured, failure: str) -> dict:
    run.submit()
    run.wait(lambda: run.steps() >= MIDDLE[run.stage])
    started = time.monotonic()
    run.slurm(*IN_JOBS[failure], run.job)
    if failure == "USR1":
        run.wait(lambda: run.state()[0] == "PENDING")
    else:
        run.end(*ENDED)
    ended, before = time.monotonic() - started, run.steps()
    if failure == "USR1":
        run.wait(lambda: run.state() and "start 2" in run.log())
    else:
        run.submit()
    found = run.row(failure, before, ended, time.monotonic())
    run.slurm("scancel", "--signal=KILL", "--full", run.job)
    run.end(*ENDED)
    return found


def in_processes(run: Measured, failure: str) -> dict:
    run.env |= {"NANOCHAT_TIMEOUT": str(TIMEOUT)}
    call = [sys.executable, "-m", "nanochat", "speedrun", "--preset", "tiny", "--to", run.stage, "--processes", "2"]
    run.paths.logs.mkdir(parents=True, exist_ok=True)
    with (run.paths.logs / "run.log").open("w") as log:
        process = subprocess.Popen(call, env=run.env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        run.wait(lambda: run.steps() >= MIDDLE[run.stage])
        launcher = workers(process.pid)[-1]
        ranks = workers(launcher)
        started = time.monotonic()
        number, victims = IN_PROCESSES[failure]
        for pid in (process.pid, launcher, *ranks) if victims == "all" else ranks[-1:]:
            os.kill(pid, number)
        process.wait()
        ended, before, started = time.monotonic() - started, run.steps(), time.monotonic()
        process = subprocess.Popen(call, env=run.env, cwd=ROOT, stdout=log, stderr=log)
        found = run.row(failure, before, ended, started)
        process.wait()
    return found


def in_an_evaluation(run: Measured) -> dict:
    """Killed in the middle of an evaluation, which starts again from its beginning."""
    call = [sys.executable, "-m", "nanochat", "speedrun", "--preset", "tiny", "--to", run.stage]
    whole, started = run.paths.section(run.stage), time.monotonic()
    process = subprocess.Popen(call, env=run.env, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    time.sleep(5)  # of 10 or so
    assert not whole.exists() and process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    lost, started = time.monotonic() - started, time.monotonic()
    subprocess.run(call, env=run.env, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    assert whole.exists()
    found = {"failure": "SIGKILL of the run", "stage": run.stage, "seconds_lost": lost}
    found |= {"seconds_of_the_stage_again": time.monotonic() - started}
    print(json.dumps(found), flush=True)
    return found


def prepare(slurm: dict, folder: Path) -> dict[str, Path]:
    """Stage → a base directory in which all before it is done."""
    found = {}
    for stage, last in BEFORE.items():
        command = [sys.executable, "-m", "nanochat", "speedrun", "--preset", "tiny", "--to", last]
        subprocess.run(command, env=Run(slurm, folder / "all").env, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        found[stage] = shutil.copytree(folder / "all", folder / f"before-{stage}")
    return found


def main() -> None:
    out, stages = Path(sys.argv[1]), sys.argv[2:] or MIDDLE
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": f"python -m tests.slurm.measure_failures {' '.join(sys.argv[1:])}",
        "save_every": SAVE_EVERY,
        "timeout": TIMEOUT,
    }
    rows = result["rows"] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([HERE / "local_slurm.sh", "start", folder / "slurm"], check=True)
        slurm = {"SLURM_CONF": str(folder / "slurm" / "slurm.conf"), "PYTHONPATH": str(HERE / "offline")}
        try:
            prepared = prepare(slurm, folder)
            rows.append(in_an_evaluation(Measured(slurm, prepared["mid-eval"], folder / "evaluation", "mid-eval")))
            for stage in stages:
                for failure in (*IN_JOBS, *IN_PROCESSES):
                    run = Measured(slurm, prepared[stage], folder / f"{len(rows)}", stage)
                    rows.append(in_a_job(run, failure) if failure in IN_JOBS else in_processes(run, failure))
                    out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")  # what was measured stays
        finally:
            subprocess.run([HERE / "local_slurm.sh", "stop", folder / "slurm"], check=False)


if __name__ == "__main__":
    main()
