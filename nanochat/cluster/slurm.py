"""The sbatch call of a job, and the command that starts the processes of a stage inside a job."""

import math
import re
import socket
import sys
from dataclasses import dataclass, replace

from nanochat.cluster.site import Site
from nanochat.options.cluster import SIGNAL_SECONDS
from nanochat.platform import environment
from nanochat.platform.errors import UserError


@dataclass(frozen=True)
class Job:
    """A job to submit. gpus: of each node; time: in Slurm's notation, empty for the site's; after: id of a job to wait for."""

    name: str
    preset: str
    nodes: int = 1
    gpus: int = 0
    tasks_per_node: int = 1
    time: str = ""
    mail: str = ""
    after: str = ""
    signal_seconds: int = SIGNAL_SECONDS
    stages: str = ""  # further options of the speedrun, quoted for a shell
    run_name: str = ""


def sbatch_command(job: Job, site: Site, base: str) -> list[str]:
    """The sbatch call of a job, without the options whose value is empty. base: the base directory.

    Raises UserError when a value has a comma, which separates variables in sbatch's --export, or a backslash, which keeps Slurm
    from filling in the name of the log.
    """
    options = {
        "job-name": f"nanochat-{job.name}",
        "account": site.account,
        "partition": site.partition if job.gpus else site.cpu_partition,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.tasks_per_node),
        "gres": f"{site.gres}:{job.gpus}" if site.gres and job.gpus else "",
        "cpus-per-task": site.cpus,
        "mem": site.memory,
        "time": job.time or site.time,
        "signal": f"B:USR1@{job.signal_seconds}" if job.name == "speedrun" else "",
        "open-mode": "append",
        "output": f"{base.replace('%', '%%')}/logs/%x-%j.log",  # %x and %j are the name and the id of the job
        "dependency": f"afterok:{job.after}" if job.after else "",
        "mail-user": job.mail,
        "mail-type": "BEGIN,END,FAIL" if job.mail else "",
    }
    passed = {"NANOCHAT_SITE": site.name, "NANOCHAT_BASE_DIR": base, "NANOCHAT_PRESET": job.preset}
    passed |= {"NANOCHAT_SIGNAL_SECONDS": str(job.signal_seconds)} if job.name == "speedrun" else {}
    passed |= {"NANOCHAT_STAGES": job.stages} if job.stages else {}
    passed |= {"NANOCHAT_RUN_NAME": job.run_name} if job.run_name else {}
    if bad := [value for value in passed.values() if "," in value or "\\" in value]:
        raise UserError(
            f"Slurm takes no values with a comma or a backslash, got {bad[0]!r}; rename the directory or the file"
        )
    arguments = [f"--{name}={value}" for name, value in options.items() if value]
    exported = ",".join(f"{name}={value}" for name, value in passed.items())
    requeue = ["--requeue"] if job.name == "speedrun" else []
    return ["sbatch", "--parsable", *arguments, *requeue, f"--export=ALL,{exported}", f"slurm/{job.name}.sbatch"]


def reduced(site: Site, needed: dict[str, str]) -> Site:
    """The site for a job that needs less than a node: of its `cpus`, `memory` and `time`, no more than is needed.

    An empty value stays Slurm's default.
    """
    size_of = {"cpus": int, "memory": megabytes_of, "time": seconds_of}
    least = {
        name: min(getattr(site, name), value, key=size_of[name])
        for name, value in needed.items()
        if getattr(site, name)
    }
    return replace(site, **least)


def distributed_launcher(processes: int) -> list[str]:
    """The words in front of `-m nanochat …` that start the processes of a stage: python for one process, torchrun for more.

    In a Slurm job of several tasks each task starts a torchrun, and they meet at the first node.
    """
    tasks = environment.slurm_tasks()
    if tasks == 1:
        alone = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return alone if processes > 1 else [sys.executable]
    job, nodes, attempt = environment.slurm_job()
    host, port = _first_host(nodes), 20_000 + job % 20_000  # jobs that share a node get different ports
    per_task = max(1, processes)
    return [
        "srun", f"--ntasks={tasks}", "--kill-on-bad-exit=1", "--export=ALL", sys.executable, "-m", "torch.distributed.run",
        f"--nnodes={tasks}", f"--nproc_per_node={per_task}", "--rdzv_backend=c10d", f"--rdzv_endpoint={host}:{port}",
        f"--rdzv_id={job}.{attempt}",
    ]  # fmt: skip


def seconds_of(limit: str) -> float:
    """The seconds of a time limit in Slurm's notation; 0 stands for no limit.

    It is minutes, minutes:seconds, hours:minutes:seconds or days-hours[:minutes[:seconds]]. Raises UserError for anything else.
    """
    days, dash, clock = limit.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in (*parts, days or "0")) or len(parts) > 3:
        raise UserError(
            f"--time {limit!r} is not a time limit; wanted minutes, hours:minutes:seconds or days-hours:minutes:seconds"
        )
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    seconds = 86400 * int(days or 0) + sum(unit * int(part) for unit, part in zip(units, parts, strict=False))
    return seconds or math.inf


def megabytes_of(memory: str) -> float:
    """The megabytes of a size in Slurm's notation, a number with perhaps K, M, G or T; 0 stands for all that a node has.

    Raises UserError for anything else.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)", memory.upper())
    if not match:
        raise UserError(
            f"memory {memory!r} is not a size; wanted a number of megabytes, or one with K, M, G or T, such as 128G"
        )
    return int(match[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[match[2]] or math.inf


def _first_host(node_list: str) -> str:
    """The first name of Slurm's compressed list: gpu[07-09,12] → gpu07."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", node_list)
    return match[1] + (match[2] or "") if match else socket.gethostname()
