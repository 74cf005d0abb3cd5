"""What faults cost a run on a Slurm of this machine: python -m tests.slurm.measure_faults build/faults.json (as root)

Each fault in the middle of each stage that trains, and a kill in one that evaluates; the row of the JSON tells how many
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
from tests.nanochat.test_lost_process import workers
from tests.slurm.test_slurm import ENDED, HERE, ROOT, Run

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

    def row(self, fault: str, before: int, ended: float, started: float) -> dict:
        """ended: seconds until all processes were gone; started: when the run was begun again."""
        self.wait(lambda: self.resumed_at() and self.steps() >= before)
        back = time.monotonic() - started
        times = {"seconds_to_end": ended, "seconds_back": back}
        found = {
            "fault": fault,
            "stage": self.stage,
            "at_step": before,
            "steps_lost": before - self.resumed_at(),
        } | times
        print(json.dumps(found), flush=True)
        return found


def in_a_job(run: Measured, fault: str) -> dict:
    run.submit()
    run.wait(lambda: run.steps() >= MIDDLE[run.stage])
    started = time.monotonic()
    run.slurm(*IN_JOBS[fault], run.job)
    if fault == "USR1":
        run.wait(lambda: run.state()[0] == "PENDING")
    else:
        run.end(*ENDED)
    ended, before = time.monotonic() - started, run.steps()
    if fault == "USR1":
        run.wait(lambda: run.state() and "start 2" in run.log())
    else:
        run.submit()
    found = run.row(fault, before, ended, time.monotonic())
    run.slurm("scancel", "--signal=KILL", "--full", run.job)
    run.end(*ENDED)
    return found


def in_a_process(run: Measured, fault: signal.Signals) -> dict:
    run.env |= {"NANOCHAT_TIMEOUT": str(TIMEOUT)}
    call = [sys.executable, "-m", "nanochat", "speedrun", "--preset", "tiny", "--to", run.stage, "--processes", "2"]
    run.paths.logs.mkdir(parents=True, exist_ok=True)
    with (run.paths.logs / "run.log").open("w") as log:
        process = subprocess.Popen(call, env=run.env, cwd=ROOT, stdout=log, stderr=log)
        run.wait(lambda: run.steps() >= MIDDLE[run.stage])
        launcher = workers(process.pid)[-1]
        started, before = time.monotonic(), run.steps()
        os.kill(workers(launcher)[-1], fault)
        process.wait()
        ended, started = time.monotonic() - started, time.monotonic()
        process = subprocess.Popen(call, env=run.env, cwd=ROOT, stdout=log, stderr=log)
        found = run.row(f"{fault.name} of one process of two", before, ended, started)
        process.wait()
    return found


def in_an_evaluation(run: Measured) -> dict:
    """Killed in the middle of an evaluation, which begins anew."""
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
    found = {"fault": "SIGKILL of the run", "stage": run.stage, "seconds_lost": lost}
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
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"command": f"python -m tests.slurm.measure_faults {out}", "save_every": SAVE_EVERY, "timeout": TIMEOUT}
    rows = result["rows"] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([HERE / "local_slurm.sh", "start", folder / "slurm"], check=True)
        slurm = {"SLURM_CONF": str(folder / "slurm" / "slurm.conf"), "PYTHONPATH": str(HERE / "offline")}
        try:
            prepared = prepare(slurm, folder)
            rows.append(in_an_evaluation(Measured(slurm, prepared["mid-eval"], folder / "evaluation", "mid-eval")))
            for stage in MIDDLE:
                for fault in (*IN_JOBS, signal.SIGSTOP, signal.SIGKILL):
                    run = Measured(slurm, prepared[stage], folder / f"{len(rows)}", stage)
                    rows.append(in_a_job(run, fault) if fault in IN_JOBS else in_a_process(run, fault))
                    out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")  # what was measured stays
        finally:
            subprocess.run([HERE / "local_slurm.sh", "stop", folder / "slurm"], check=False)


if __name__ == "__main__":
    main()
