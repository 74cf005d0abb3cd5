"""`nanochat cluster status`: the progress of a run, from the files that it writes, and its jobs if Slurm is installed."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table

from nanochat.cluster.submit import log_of
from nanochat.options.cluster import StatusOptions
from nanochat.platform.console import format_duration, say, show_table
from nanochat.platform.errors import UserError
from nanochat.platform.files import json_lines, read_json
from nanochat.platform.lock import described, holder
from nanochat.platform.paths import TRAINING_STAGES, Paths, steps_in
from nanochat.report.sections import read_section
from nanochat.speedrun.records import record_path
from nanochat.speedrun.stages import STAGES, Stage
from nanochat.train.metrics import read_metrics

SHOWN = 8  # the last jobs of a run
# Slurm's reasons for which a job waits for ever, and what to change
NEVER_STARTS = (
    (
        "PartitionConfig|PartitionNodeLimit",
        "the partition has fewer nodes than it asks for; lower --nodes",
    ),
    ("MaxNodePerJob", "its account or QOS may not have so many nodes; lower --nodes"),
    (
        "PartitionTimeLimit|WallDurationPerJob",
        "its time limit is longer than is allowed; lower --time or NANOCHAT_TIME",
    ),
    ("PartitionDown|PartitionInactive", "its partition takes no jobs; name another in the site profile"),
    (
        "BadConstraints|PerJob|PerNode|MaxMemPerLimit",
        "no node may give what it asks for; lower --gpus, or NANOCHAT_CPUS and NANOCHAT_MEMORY in the site profile",
    ),
    ("DependencyNeverSatisfied", "the job that it waits for has failed; fix what the log of that one names"),
    ("InvalidAccount|AccountNotAllowed", "it may not run for its account; name another with --account"),
    (
        "InvalidQOS|QOSNotAllowed",
        "Slurm's default QOS of its account may not be used there; ask the cluster's administrators",
    ),
)


class SubmittedJob(NamedTuple):
    """A job as squeue knows it; state and reason in Slurm's words."""

    id: str
    name: str
    state: str
    ran: str
    limit: str
    reason: str

    @property
    def never_starts(self) -> str:
        """Why it will never start, and what to change; empty for any other job."""
        if self.state not in ("PENDING", "FAILED"):
            return ""
        return next((text for reasons, text in NEVER_STARTS if re.search(reasons, self.reason)), "")

    @property
    def goes_on(self) -> bool:
        """Whether it runs, or will."""
        alive = ("PENDING", "CONFIGURING", "RUNNING", "REQUEUED", "REQUEUE_HOLD", "COMPLETING", "SUSPENDED")
        return self.state in alive and not self.never_starts


@dataclass(frozen=True)
class Progress:
    """How far a stage is. last: its newest metrics, empty if it has none; seconds: how long it took, None if it has not finished."""

    stage: Stage
    last: dict
    seconds: float | None
    holder: dict | None  # of its lock
    was_killed: bool  # it left its lock
    saved: int | None  # the newest step that has a checkpoint

    @classmethod
    def of(cls, paths: Paths, stage: Stage) -> "Progress":
        metrics = read_metrics(paths.metrics(stage.name), "tokens_per_second", "loss")
        last = metrics[-1] if metrics else {}
        who, saved = holder(paths.lock(stage.name)), list(steps_in(paths.checkpoints(stage.name)))
        killed = who is None and paths.lock(stage.name).exists()
        return cls(stage, last, _seconds(paths, stage, last), who, killed, saved[-1] if saved else None)

    @property
    def has_begun(self) -> bool:
        return self.seconds is not None or self.holder is not None or bool(self.last) or self.was_killed

    @property
    def stopped(self) -> bool:
        """Whether it began and did not finish, and nothing works on it."""
        return self.has_begun and self.seconds is None and self.holder is None

    def row(self) -> tuple[str, ...]:
        """Name, state, step, loss, tokens per second and time left, as text."""
        last, left = self.last, ""
        if self.holder is not None:
            state, remaining = "running", last.get("remaining")  # None in the first steps, which compile and capture
            known = isinstance(remaining, int | float)
            left = "" if not self.stage.trains else format_duration(remaining) if known else "not known yet"
        elif self.seconds is not None:
            state = f"done in {format_duration(self.seconds)}"
        else:
            state = "stopped" if self.stopped else "to come"
        numbers = ("", "", "")
        if last:
            numbers = (f"{last['step'] + 1:,}", f"{last['loss']:.4f}", f"{last['tokens_per_second']:,.0f}")
        return (self.stage.name, state, *numbers, left)

    def how_it_goes_on(self, jobs: list[SubmittedJob]) -> str:
        """What to do about the stage that comes next when nothing works on the run."""
        at_step = f" at step {self.last['step'] + 1:,}" if self.last else ""
        stopped = f"stage {self.stage.name} {'has stopped' if self.stopped else 'has not started'}{at_step}"
        goes_on = f"resumes it at step {self.saved:,}" if self.saved is not None else "starts it"
        queued = [job for job in jobs if job.name == "nanochat-speedrun" and job.goes_on]
        return f"{stopped}; {f'job {queued[-1].id} ({queued[-1].state.lower()})' if queued else 'the same command again'} {goes_on}"


def status(options: StatusOptions, paths: Paths) -> None:
    """Print a table of the stages, what works on the run or how it goes on, and the run's last jobs."""
    if not paths.run.exists() and paths.runs and not any(_run_of(job) == paths.run_name for job in _noted(paths)):
        raise UserError(f"there is no run {paths.run_name} in {paths.base}{paths.other_runs}")
    stages = [Progress.of(paths, stage) for stage in STAGES if stage.name != "data" or paths.embedded.exists()]
    stages = [progress for progress in stages if not progress.stage.optional or progress.has_begun]
    table = Table("stage", "state", "step", "loss", "tokens/s", "left", box=None)
    for progress in stages:
        table.add_row(*progress.row())
    show_table(table)
    say(f"run {paths.run_name}: {paths.run}")
    jobs, running = list(_jobs(paths)), [progress for progress in stages if progress.holder is not None]
    for progress in running:
        say(f"stage {progress.stage.name} is running: {described(progress.holder)}")
    if not running and holder(paths.lock("speedrun")) is None:
        finished = [number for number, progress in enumerate(stages) if progress.seconds is not None]
        removed = [progress for progress in stages if progress.seconds is None and _said(paths, progress.stage)]
        later = stages[finished[-1] + 1 if finished else 0 :]
        for progress in ([progress for progress in stages if progress.stopped] or removed or later)[:1]:
            say(progress.how_it_goes_on(jobs))
    for job in jobs:
        say(f"job {job.id} {job.name}: {job.state}, {job.ran} of {job.limit}, {job.reason}")
        if job.never_starts:
            cancel = f"cancel it with: scancel {job.id}, and " if job.state == "PENDING" else ""
            say(f"  it never starts: {job.never_starts}; {cancel}submit again")
        elif "held" in job.reason.lower():
            say(f"  it is held; let it go with: scontrol release {job.id}")
        elif job.state not in ("PENDING", "COMPLETED"):
            say(f"  its output: {log_of(paths, job.name.removeprefix('nanochat-'), job.id)}")


def _seconds(paths: Paths, stage: Stage, last: dict) -> float | None:
    """How long a finished stage took; None when it has not finished. last: its newest metrics.

    A stage that was run by itself has no record. One that is trained again has a section, of another number of steps.
    """
    trained = stage.name.removesuffix("-eval")
    if trained in TRAINING_STAGES and not steps_in(paths.checkpoints(trained)):
        return None  # the checkpoints were removed
    section = read_section(paths, stage.name)
    if section and last and section["results"].get("steps") != last["step"] + 1:
        return None
    finished = _said(paths, stage)
    return finished["seconds"] if finished else None


def _said(paths: Paths, stage: Stage) -> dict | None:
    """The record of a stage that finished, or its section; its files may have been removed since."""
    return read_json(record_path(paths, stage), {"seconds": float}) or read_section(paths, stage.name)


def _noted(paths: Paths) -> list[dict]:
    """The jobs that were submitted, of all runs."""
    noted = [job for _, job in json_lines(paths.jobs)] if paths.jobs.exists() else []
    return [job for job in noted if isinstance(job, dict) and "id" in job]  # a line may be cut off


def _run_of(job: dict) -> str | None:
    return job.get("run", job.get("preset"))


def _jobs(paths: Paths) -> Iterator[SubmittedJob]:
    """The last jobs of the run that Slurm still knows; of all runs while the run has no files, as before its first job starts."""
    noted = _noted(paths)
    if paths.run.exists():
        noted = [job for job in noted if _run_of(job) == paths.run_name]
    ids = [str(job["id"]) for job in noted[-SHOWN:]]
    if not ids or not shutil.which("squeue"):
        return
    queue = subprocess.run(
        ["squeue", "--noheader", "--format=%i|%j|%T|%M|%l|%r", "--states=all", f"--jobs={','.join(ids)}"],
        capture_output=True, text=True,
    )  # fmt: skip
    lines = [line.split("|", 5) for line in queue.stdout.splitlines()]
    yield from (SubmittedJob(*fields) for fields in lines if len(fields) == 6)
