"""What faults cost a run on a Slurm of this machine: python -m tests.slurm.measure_faults build/faults.json (as root)"""

import json
import os
import re
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


def steps(run: Run, stage: str) -> int:
    return len([m for m in read_metrics(run.paths.metrics(stage)) if "loss" in m])


def resumed_at(text: str, stage: str) -> int:
    found = re.findall(rf"resuming {stage} at step (\d+)", text)
    return int(found[-1]) if found else 0


def row(fault: str, run: Run, stage: str, before: int, ended: float, started: float) -> dict:
    """ended: seconds until all processes were gone; started: when the run was begun again."""
    run.wait(lambda: resumed_at(run.log(), stage) and steps(run, stage) >= before)
    back = time.monotonic() - started
    lost = before - resumed_at(run.log(), stage)
    found = {
        "fault": fault,
        "stage": stage,
        "at_step": before,
        "steps_lost": lost,
        "seconds_to_end": ended,
        "seconds_back": back,
    }
    print(json.dumps(found), flush=True)
    return found


def in_jobs(slurm: dict, folder: Path, fault: str, stage: str, after: int, command: tuple[str, ...]) -> dict:
    run = Run(slurm, folder / f"{fault}-{stage}".replace(" ", "_"), "--time=10", "--signal-seconds=30")
    run.submit()
    run.wait(lambda: steps(run, stage) >= after)
    started = time.monotonic()
    run.slurm(*command, run.job)
    if fault == "USR1":
        run.wait(lambda: run.state()[0] == "PENDING")
    else:
        run.end(*ENDED)
    ended, before = time.monotonic() - started, steps(run, stage)
    if fault == "USR1":
        run.wait(lambda: run.log().count("start 2") == 1)
    else:
        run.submit()
    found = row(fault, run, stage, before, ended, time.monotonic())
    run.slurm("scancel", "--signal=KILL", "--full", run.job)
    run.end(*ENDED)
    return found


def in_a_process(slurm: dict, folder: Path, fault: signal.Signals) -> dict:
    run = Run(slurm, folder / fault.name)
    run.env |= {"NANOCHAT_TIMEOUT": "8"}
    call = [sys.executable, "-m", "nanochat", "speedrun", "--preset", "tiny", "--to", "base", "--processes", "2"]
    run.paths.logs.mkdir(parents=True)
    log = (run.paths.logs / "run.log").open("w")
    process = subprocess.Popen(call, env=run.env, cwd=ROOT, stdout=log, stderr=log)
    while steps(run, "base") < 70:
        time.sleep(0.1)
    launcher = workers(process.pid)[-1]
    started, before = time.monotonic(), steps(run, "base")
    os.kill(workers(launcher)[-1], fault)
    process.wait()
    ended, started = time.monotonic() - started, time.monotonic()
    process = subprocess.Popen(call, env=run.env, cwd=ROOT, stdout=log, stderr=log)
    while steps(run, "base") < before or resumed_at(run.log(), "base") == 0:
        time.sleep(0.1)
    found = {"fault": f"{fault.name} of one process of two", "stage": "base", "at_step": before}
    found |= {"steps_lost": before - resumed_at(run.log(), "base"), "seconds_to_end": ended}
    found |= {"seconds_back": time.monotonic() - started}
    print(json.dumps(found), flush=True)
    process.wait()
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([HERE / "local_slurm.sh", "start", folder / "slurm"], check=True)
        slurm = {"SLURM_CONF": str(folder / "slurm" / "slurm.conf"), "PYTHONPATH": str(HERE / "offline")}
        try:
            rows = []
            for fault, command in (
                ("USR1", ("scancel", "--signal=USR1", "--batch")),
                ("scancel", ("scancel",)),
                ("SIGKILL of the job", ("scancel", "--signal=KILL", "--full")),
            ):
                rows.append(in_jobs(slurm, folder, fault, "base", 70, command))
            rows += [in_a_process(slurm, folder, fault) for fault in (signal.SIGSTOP, signal.SIGKILL)]
        finally:
            subprocess.run([HERE / "local_slurm.sh", "stop", folder / "slurm"], check=False)
    result = {"command": "python -m tests.slurm.measure_faults", "save_every": SAVE_EVERY, "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
