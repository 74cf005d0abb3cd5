"""`nanochat cluster submit`: submits a job to Slurm, or shows the sbatch calls."""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from nanochat.cluster.site import ROOT, Site, base_directory, load_site
from nanochat.cluster.slurm import Job, reduced, sbatch_command, seconds_of
from nanochat.options.cluster import SubmitOptions
from nanochat.options.presets import ON_CPU, ON_CPU_NEEDS
from nanochat.platform import environment
from nanochat.platform.console import say
from nanochat.platform.errors import UserError, remedy_for
from nanochat.platform.paths import Paths
from nanochat.speedrun.stages import check_order, check_stage
from nanochat.tasks import CustomJSON

EARLY = 60  # seconds by which Slurm may send a signal before it is due
START_UP = 120  # seconds for modules, preflight, imports and the compilation of kernels, before the first step
# what the gate needs: one GPU, and the memory for a model's weights and the compiler
GATE_NEEDS = {"memory": "64G", "time": "1:00:00"}
# the options that only a speedrun has
OF_SPEEDRUN = {
    "first": "--from", "last": "--to", "rl": "--rl", "custom_json": "--custom-json", "changed": "--changed", "nodes": "--nodes",
    "after_gate": "--after-gate", "tasks_per_node": "--tasks-per-node",
}  # fmt: skip


def submit(options: SubmitOptions) -> None:
    """Submit a job, with the gate's job in front of it if the user asks for it, and note it for `cluster status`.

    Raises UserError when Slurm is not installed or rejects the job.
    """
    site = load_site(options.site or environment.site_name(), account=options.account, mail_user=options.mail_user)
    base = base_directory(site)
    paths = Paths(Path(base)).of_run(options.run_name or options.preset)
    submitted = ""
    for job in _jobs(options, site):
        job = replace(job, after=submitted)
        command = sbatch_command(job, _asked_of(site, job), base)
        if options.dry_run:
            say(shlex.join(command))
            submitted = f"<{job.name}>"
            continue
        paths.logs.mkdir(parents=True, exist_ok=True)
        submitted = _call(command)
        say(f"submitted {job.name}: job {submitted}")
        _note(paths, job, submitted)
        say(f"  tail -F {shlex.quote(str(log_of(paths, job.name, submitted)))}")
    if not options.dry_run:
        say("watch it with:")
        say(
            f"  squeue --me\n  NANOCHAT_BASE_DIR={shlex.quote(base)} nanochat cluster status --run-name {paths.run_name}"
        )


def log_of(paths: Paths, name: str, job_id: str) -> Path:
    """The file with the output of a job."""
    return paths.logs / f"nanochat-{name}-{job_id}.log"


def _jobs(options: SubmitOptions, site: Site) -> list[Job]:
    """The jobs that the options ask for, in order. Raises UserError for options that do not fit together."""
    gpus = options.gpus
    if gpus < 0:
        gpus = 0 if options.preset in ON_CPU else int(site.gpus or 8)
    if gpus and options.tasks_per_node > 1:
        raise UserError("one task per node serves all of its GPUs; --tasks-per-node is for runs without GPUs")
    if not gpus and (options.job != "speedrun" or options.after_gate):
        job = "gate" if options.job == "speedrun" else options.job
        without = ", or leave --after-gate out" if options.after_gate else ""
        raise UserError(f"the job {job} measures kernels on a GPU, and the job would have none; add --gpus 1{without}")
    for option, name in (("--from", options.first), ("--to", options.last)):
        if name:
            check_stage(option, name, options.rl)
    if options.first and options.last:
        check_order(options.first, options.last)
    shared = Job(options.job, options.preset, time=options.time, mail=site.mail_user, run_name=options.run_name)
    alone = replace(shared, gpus=min(gpus, 1))
    if options.job != "speedrun":
        chosen = [
            name for name, option in OF_SPEEDRUN.items() if getattr(options, name) != getattr(SubmitOptions(), name)
        ]
        if chosen:
            raise UserError(
                f"{', '.join(OF_SPEEDRUN[name] for name in chosen)} belong to the job speedrun; leave them out"
            )
        return [alone]
    for path in options.custom_json:
        CustomJSON(path)  # a mistake in it is found now, and not when the job begins
    chosen = {"--from": options.first, "--to": options.last, "--changed": options.changed.replace("refuse", "")}
    stages = [word for option, value in chosen.items() if value for word in (option, value)]
    stages += ["--rl"] * options.rl
    if options.custom_json:
        stages += ["--custom-json", *(os.path.abspath(path) for path in options.custom_json)]
    speedrun = replace(
        shared,
        nodes=options.nodes,
        gpus=gpus,
        tasks_per_node=options.tasks_per_node,
        signal_seconds=options.signal_seconds,
        stages=shlex.join(stages),
    )
    _check_limit(options.time or _asked_of(site, speedrun).time, options.signal_seconds)
    return [replace(alone, name="gate"), speedrun] if options.after_gate else [speedrun]


def _asked_of(site: Site, job: Job) -> Site:
    """The site with what a job asks of it: less than a node for a run on CPUs and for the gate."""
    if job.name == "gate":
        return reduced(site, GATE_NEEDS)
    return reduced(site, ON_CPU_NEEDS) if job.name == "speedrun" and job.preset in ON_CPU else site


def _check_limit(limit: str, signal_seconds: int) -> None:
    """Raise UserError for a time limit that leaves no time to train between the start and the signal to save."""
    needed = START_UP + EARLY + signal_seconds
    if limit and seconds_of(limit) < needed:
        raise UserError(
            f"--time {limit} leaves no time to train: starting takes up to {START_UP} s, and the signal to save comes "
            f"{signal_seconds} to {signal_seconds + EARLY} s before the end, so that the job would be queued again and again; raise "
            f"--time to at least {-(-needed // 60)} minutes or lower --signal-seconds"
        )


def _call(command: list[str]) -> str:
    """Run an sbatch call; returns the id of the job that it queued."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on the PATH; run this on a login node of a Slurm cluster, or see the call with --dry-run"
        )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"Slurm rejected the job: {done.stderr.strip()}; the call was: {shlex.join(command)}")
    # a line of its own, perhaps with the name of the cluster; sites let sbatch print other lines too
    ids = re.findall(r"^(\d+)(?:;\S*)?$", done.stdout, re.MULTILINE)
    if not ids:
        raise UserError(
            f"sbatch did not say which job it queued, it printed {done.stdout.strip()!r}; look for the job with: squeue --me"
        )
    return ids[-1]


def _note(paths: Paths, job: Job, job_id: str) -> None:
    """Add a job to the list that `cluster status` reads; a list that cannot be written changes nothing for the job."""
    record = {"id": job_id, "job": job.name, "run": paths.run_name, "submitted": time.strftime("%F %T")}
    try:
        with paths.jobs.open("a", encoding="utf-8") as jobs:
            jobs.write(json.dumps(record) + "\n")
    except OSError as error:
        say(
            f"note {paths.jobs} cannot be written ({error.strerror}; {remedy_for(error)}): the job will run, but nanochat cluster "
            f"status does not list it; squeue --job {job_id} does"
        )
