"""The commands about a cluster: submit a job to Slurm, and tell how a run stands from the files it writes."""

import json
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table

from nanochat.cluster import ROOT, SIGNAL_SECONDS, Job, base_directory, load_site, mail_user, sbatch_command, seconds_of
from nanochat.console import console, say
from nanochat.errors import UserError
from nanochat.paths import Paths
from nanochat.pipeline import NAMES, STEPS
from nanochat.presets import EMBEDDED, PresetName
from nanochat.train.metrics import read_metrics

SHORTEST_RUN = 35  # seconds, in which a start gets somewhere
STALE_SECONDS = 300  # without a new line in its metrics a stage is not called running


@dataclass(frozen=True)
class SubmitConfig:
    """Submit a job to Slurm. The same submission after any end goes on where the run stopped."""

    job: Annotated[Literal["speedrun", "gate", "bench", "profile"], tyro.conf.Positional] = "speedrun"
    """speedrun: the whole run; gate: choose kernels; bench: measure them; profile: record them"""
    site: str = "generic"
    """site profile: slurm/<site>.env, or the path of such a file"""
    preset: PresetName = "d20"
    """cpu, tiny, d20, d26 or d32"""
    first: Annotated[str, tyro.conf.arg(name="from")] = ""
    """stage of the speedrun to begin with; earlier ones must have finished"""
    last: Annotated[str, tyro.conf.arg(name="to")] = ""
    """stage of the speedrun to end with"""
    after_gate: bool = False
    """submit the gate too, and begin only when it has succeeded"""
    nodes: int = 1
    """nodes of the speedrun"""
    gpus: int = -1
    """GPUs of each node; negative: the site's number, and none for the presets of a CPU"""
    tasks_per_node: int = 1
    """torchrun launchers of a node; more than one only without GPUs"""
    time: str = ""
    """time limit in Slurm's notation; the site's when not given. A run that does not fit is queued again until it is done"""
    signal_seconds: int = SIGNAL_SECONDS
    """how long before the time limit the run is asked to save"""
    mail_user: str = ""
    """address that Slurm writes to at begin, end and failure; else MAIL_USER of the environment or of .env.local"""
    dry_run: bool = False
    """show the sbatch calls and do nothing"""


def submit(config: SubmitConfig) -> None:
    """Raises UserError when Slurm is not there or refuses."""
    if config.nodes < 1 or config.tasks_per_node < 1:
        raise UserError(
            f"--nodes and --tasks-per-node must be at least 1, got {config.nodes} and {config.tasks_per_node}"
        )
    site = load_site(config.site)
    base = base_directory(site)
    plain = config.preset in EMBEDDED
    gpus = config.gpus if config.gpus >= 0 else 0 if plain else int(site.gpus or 8)
    if gpus and config.tasks_per_node > 1:
        raise UserError("one task a node serves all of its GPUs; --tasks-per-node is for runs without")
    for option, name in (("--from", config.first), ("--to", config.last)):
        if name and name not in NAMES:
            raise UserError(f"{option} {name}: no such stage; there are: {', '.join(NAMES)}")
    limit = config.time or site.time
    if limit and seconds_of(limit) < config.signal_seconds + SHORTEST_RUN:
        raise UserError(
            f"--time {limit} leaves less than {SHORTEST_RUN} s before the signal to save, {config.signal_seconds} s ahead of its "
            "end: the job would be queued again and again; give more time, or a smaller --signal-seconds"
        )
    stages = " ".join(f"{option} {name}" for option, name in (("--from", config.first), ("--to", config.last)) if name)
    mail = mail_user(config.mail_user)
    names = ["gate", "speedrun"] if config.job == "speedrun" and config.after_gate else [config.job]
    submitted = ""
    for name in names:
        whole = name == "speedrun"
        job = Job(
            name, config.preset, config.nodes if whole else 1, gpus if whole else min(gpus, 1),
            config.tasks_per_node if whole else 1, config.time, mail, submitted, config.signal_seconds, stages,
        )  # fmt: skip
        command = sbatch_command(job, site, base)
        if config.dry_run:
            say(shlex.join(command))
            submitted = f"<{name}>"
            continue
        Paths(Path(base)).logs.mkdir(parents=True, exist_ok=True)
        submitted = _call(command)
        record = {"id": submitted, "job": name, "preset": config.preset, "submitted": time.strftime("%F %T")}
        with Paths(Path(base)).jobs.open("a", encoding="utf-8") as jobs:
            jobs.write(json.dumps(record) + "\n")
        say(f"submitted {name}: job {submitted}")
        say(f"  tail -F {base}/logs/nanochat-{name}-{submitted}.log")
    if not config.dry_run:
        say("watch it with:")
        say(f"  squeue --me\n  NANOCHAT_BASE_DIR={base} nanochat cluster status")


def _call(command: list[str]) -> str:
    """The id of the job that sbatch queued."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on the PATH; run this on a login node of a Slurm cluster, or look with --dry-run"
        )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"Slurm refused: {done.stderr.strip()}; the call was: {shlex.join(command)}")
    return done.stdout.strip().split(";")[0]


@dataclass(frozen=True)
class StatusConfig:
    """Show how far a run is, from the files it writes: stages, step, tokens/s, time left; and its jobs where Slurm is there."""


def status(config: StatusConfig, paths: Paths) -> None:
    table = Table("stage", "state", "step", "loss", "tokens/s", "left", box=None)
    for step in STEPS:
        table.add_row(step.name, *_state(paths, step))
    console.print(table)
    say(f"files: {paths.base}")
    ids = [json.loads(line)["id"] for line in paths.jobs.read_text("utf-8").splitlines()] if paths.jobs.exists() else []
    if ids and shutil.which("squeue"):
        queue = subprocess.run(
            ["squeue", "--noheader", "--format=%i %j %T %M of %l, %r", "--states=all", f"--jobs={','.join(ids[-8:])}"],
            capture_output=True, text=True,
        )  # fmt: skip
        say(queue.stdout.strip() or f"Slurm no longer knows the jobs {', '.join(ids[-8:])}")


def _state(paths: Paths, step) -> tuple[str, ...]:
    record = paths.records / f"{step.name}.json"
    metrics = [line for line in read_metrics(paths.metrics(step.name)) if "tokens_per_second" in line]
    numbers = ("", "", "", "")
    if metrics:
        last = metrics[-1]
        numbers = (f"{last['step'] + 1:,}", f"{last['smoothed_loss']:.4f}", f"{last['tokens_per_second']:,.0f}", "")
    if record.exists():
        return (f"done in {json.loads(record.read_text('utf-8'))['seconds']:.0f} s", *numbers)
    if not metrics:
        return ("to come", *numbers)
    age = time.time() - paths.metrics(step.name).stat().st_mtime
    remaining = metrics[-1].get("remaining")  # None in the first steps, whose pace says nothing
    left = "not known yet" if remaining is None else f"{remaining / 60:.1f} min"
    return ("running" if age < STALE_SECONDS else f"no news for {age / 60:.0f} min", *numbers[:3], left)
