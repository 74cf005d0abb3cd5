"""`nanochat cluster submit`: submits a job to Slurm, or shows the sbatch calls."""

import json
import shlex
import shutil
import subprocess
import time
from pathlib import Path

from nanochat.cluster.site import ROOT, base_directory, load_site
from nanochat.cluster.slurm import Job, sbatch_command, seconds_of
from nanochat.options.cluster import SubmitOptions
from nanochat.options.presets import EMBEDDED
from nanochat.platform.console import say
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.speedrun.stages import NAMES

SHORTEST_RUN = 35  # seconds that a job needs to start and to make some progress


def submit(options: SubmitOptions) -> None:
    """Submit a job, with the gate's job in front of it if the user asks for it, and note it for `cluster status`.

    Raises UserError when Slurm is not installed or rejects the job.
    """
    site = load_site(options.site, account=options.account, mail_user=options.mail_user)
    base = base_directory(site)
    gpus = options.gpus
    if gpus < 0:
        gpus = 0 if options.preset in EMBEDDED else int(site.gpus or 8)
    if gpus and options.tasks_per_node > 1:
        raise UserError("one task per node serves all of its GPUs; --tasks-per-node is for runs without GPUs")
    for option, name in (("--from", options.first), ("--to", options.last)):
        if name and name not in NAMES:
            raise UserError(f"{option} {name}: no such stage; there are: {', '.join(NAMES)}")
    limit = options.time or site.time
    if limit and seconds_of(limit) < options.signal_seconds + SHORTEST_RUN:
        raise UserError(
            f"--time {limit} leaves less than {SHORTEST_RUN} s before the signal to save, {options.signal_seconds} s before the "
            "end: the job would be queued again and again; raise --time or lower --signal-seconds"
        )
    run = Paths(Path(base)).of_run(options.run_name or options.preset)
    chosen = {"--from": options.first, "--to": options.last, "--changed": options.changed.replace("refuse", "")}
    stages = " ".join(f"{option} {value}" for option, value in chosen.items() if value)
    names = ["gate", "speedrun"] if options.job == "speedrun" and options.after_gate else [options.job]
    submitted = ""
    for name in names:
        is_speedrun = name == "speedrun"
        job = Job(
            name, options.preset, options.nodes if is_speedrun else 1, gpus if is_speedrun else min(gpus, 1),
            options.tasks_per_node if is_speedrun else 1, options.time, site.mail_user, submitted, options.signal_seconds, stages,
            options.run_name,
        )  # fmt: skip
        command = sbatch_command(job, site, base)
        if options.dry_run:
            say(shlex.join(command))
            submitted = f"<{name}>"
            continue
        Paths(Path(base)).logs.mkdir(parents=True, exist_ok=True)
        submitted = _call(command)
        record = {"id": submitted, "job": name, "preset": options.preset, "submitted": time.strftime("%F %T")}
        with Paths(Path(base)).jobs.open("a", encoding="utf-8") as jobs:
            jobs.write(json.dumps(record) + "\n")
        say(f"submitted {name}: job {submitted}")
        say(f"  tail -F {base}/logs/nanochat-{name}-{submitted}.log")
    if not options.dry_run:
        say("watch it with:")
        say(f"  squeue --me\n  NANOCHAT_BASE_DIR={shlex.quote(base)} nanochat cluster status --run-name {run.run_name}")


def _call(command: list[str]) -> str:
    """Run an sbatch call; returns the id of the job that it queued."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on the PATH; run this on a login node of a Slurm cluster, or see the call with --dry-run"
        )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"Slurm rejected the job: {done.stderr.strip()}; the call was: {shlex.join(command)}")
    return done.stdout.strip().split(";")[0]
