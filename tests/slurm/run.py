"""A run on the Slurm of this machine: submitted, watched, and submitted again."""

import json
import subprocess
import sys
import time
from pathlib import Path

from nanochat.platform.paths import Paths
from nanochat.train.metrics import read_metrics
from tests.conftest import environment

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SITE = str(HERE / "local.env")


class Run:
    """A base directory whose run is submitted, again and again."""

    def __init__(self, slurm: dict, base: Path, *options: str, preset: str = "tiny"):
        self.paths, self.options, self.preset = Paths(base, preset), options, preset
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
            if time.monotonic() - held > 3:
                self.slurm("scontrol", "update", f"JobId={self.job}", "StartTime=now")
        return shown["JobState"], int(shown["Restarts"])

    def wait(self, until) -> None:
        end = time.monotonic() + 1500
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
        losses = {
            s: [(m["step"], m["loss"]) for m in read_metrics(self.paths.metrics(s)) if "loss" in m] for s in stages
        }
        assert all(losses.values()), f"a stage without losses in {self.paths.records}"
        return losses


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
