"""`nanochat cluster status`: the progress of a run, from the files that it writes, and its jobs if Slurm is installed."""

import shutil
import subprocess
import time

from rich.table import Table

from nanochat.options.cluster import StatusOptions
from nanochat.platform.console import format_duration, say, show_table
from nanochat.platform.files import json_lines, read_json
from nanochat.platform.paths import Paths
from nanochat.speedrun.records import record_path
from nanochat.speedrun.stages import STAGES, Stage
from nanochat.train.metrics import read_metrics

STALE_SECONDS = 300  # a stage whose metrics have no new line for so long is not shown as running


def status(options: StatusOptions, paths: Paths) -> None:
    """Print a table of the stages, and the run's last eight jobs."""
    table = Table("stage", "state", "step", "loss", "tokens/s", "left", box=None)
    for stage in STAGES:
        table.add_row(stage.name, *_state(paths, stage))
    show_table(table)
    say(f"run {paths.run_name}: {paths.run}")
    jobs = [job for _, job in json_lines(paths.jobs)] if paths.jobs.exists() else []
    ids = [str(job["id"]) for job in jobs if isinstance(job, dict) and "id" in job]  # a line may be cut off
    if ids and shutil.which("squeue"):
        queue = subprocess.run(
            ["squeue", "--noheader", "--format=%i %j %T %M of %l, %r", "--states=all", f"--jobs={','.join(ids[-8:])}"],
            capture_output=True, text=True,
        )  # fmt: skip
        say(queue.stdout.strip() or f"Slurm no longer knows the jobs {', '.join(ids[-8:])}")


def _state(paths: Paths, stage: Stage) -> tuple[str, ...]:
    """State, step, loss, tokens per second and time left of a stage, as text."""
    record = read_json(record_path(paths, stage), {"seconds": float})
    metrics = read_metrics(paths.metrics(stage.name), "tokens_per_second", "smoothed_loss")
    numbers = ("", "", "", "")
    if metrics:
        last = metrics[-1]
        numbers = (f"{last['step'] + 1:,}", f"{last['smoothed_loss']:.4f}", f"{last['tokens_per_second']:,.0f}", "")
    if record is not None:
        return (f"done in {format_duration(record['seconds'])}", *numbers)
    if not metrics:
        return ("to come", *numbers)
    age = time.time() - paths.metrics(stage.name).stat().st_mtime
    timed = read_metrics(paths.metrics(stage.name), "remaining")[
        -1:
    ]  # not in the first steps, which compile and capture
    left = format_duration(timed[0]["remaining"]) if timed == metrics[-1:] else "not known yet"
    return ("running" if age < STALE_SECONDS else f"no news for {format_duration(age)}", *numbers[:3], left)
