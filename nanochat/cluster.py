"""What the program knows of Slurm: site profiles, the sbatch call of a job, and how a stage's processes start in one."""

import getpass
import os
import re
import shlex
import socket
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from string import Template

from nanochat.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SIGNAL_SECONDS = 600  # before the time limit a run is asked to save: an evaluation under way ends first


@dataclass(frozen=True)
class Site:
    """What is peculiar to a cluster; slurm/<name>.env holds it, as the scripts read it too. Empty: Slurm's own default."""

    name: str
    values: dict[str, str] = field(default_factory=dict)

    def __getattr__(self, name: str) -> str:
        return self.values.get(f"NANOCHAT_{name.upper()}", "")


def load_site(name: str, folder: Path = ROOT / "slurm") -> Site:
    """The profile slurm/<name>.env, or the file that `name` is a path of. Raises UserError naming the profiles there are."""
    path = Path(name) if name.endswith(".env") else folder / f"{name}.env"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*.env")))
        raise UserError(
            f"--site {name}: {path} does not exist; there are: {there}; copy slurm/generic.env for a new one"
        )
    values = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(NANOCHAT_[A-Z_]+)=(.*)", line)
        if not match:
            raise UserError(f"{path}:{number}: wanted NANOCHAT_NAME=value, got {line!r}")
        value = " ".join(shlex.split(match[2], comments=True))
        values[match[1]] = Template(value).safe_substitute({"USER": getpass.getuser(), **os.environ})
        if "$" in values[match[1]]:
            raise UserError(f"{path}:{number}: {values[match[1]]!r} names a variable that is not set here")
    return Site(str(path.resolve()) if name.endswith(".env") else name, values)


def base_directory(site: Site) -> str:
    """Where a job keeps its files: NANOCHAT_BASE_DIR as it is here, else on the site's scratch, else the program's default."""
    configured = os.environ.get("NANOCHAT_BASE_DIR")
    if configured:
        return str(Path(configured).expanduser().absolute())
    return f"{site.scratch}/nanochat-cache" if site.scratch else str(Path.home() / ".cache" / "nanochat")


def mail_user(option: str, folder: Path = ROOT) -> str:
    """Whom Slurm writes to: the option, else MAIL_USER or NANOCHAT_MAIL_USER of the environment or of .env.local, in any case.

    Raises UserError for what is no address."""
    found = option or _any_case(dict(os.environ))
    if not found and (folder / ".env.local").is_file():
        pairs = (line.partition("=") for line in (folder / ".env.local").read_text("utf-8").splitlines())
        found = _any_case({name.strip().removeprefix("export "): value.strip(" \"'") for name, _, value in pairs})
    if found and not re.fullmatch(r"[^\s@,]+@[^\s@,]+", found):
        raise UserError(f"--mail-user {found!r} is no address; wanted name@host")
    return found


def _any_case(values: dict[str, str]) -> str:
    named = {name.upper(): value for name, value in values.items()}
    return named.get("NANOCHAT_MAIL_USER") or named.get("MAIL_USER") or ""


@dataclass(frozen=True)
class Job:
    """A job to submit. gpus: of each node; time: Slurm's notation, empty for the site's."""

    name: str
    preset: str
    nodes: int = 1
    gpus: int = 0
    tasks_per_node: int = 1
    time: str = ""
    mail: str = ""
    after: str = ""
    signal_seconds: int = SIGNAL_SECONDS
    stages: str = ""  # --from and --to of the speedrun


def sbatch_command(job: Job, site: Site, base: str) -> list[str]:
    """The sbatch call. A profile's empty values leave their option out."""
    options = {
        "job-name": f"nanochat-{job.name}",
        "account": site.account,
        "partition": site.partition,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.tasks_per_node),
        "gres": f"{site.gres}:{job.gpus}" if site.gres and job.gpus else "",
        "cpus-per-task": site.cpus,
        "mem": site.memory,
        "time": job.time or site.time,
        "signal": f"B:USR1@{job.signal_seconds}" if job.name == "speedrun" else "",
        "open-mode": "append",
        "output": f"{base}/logs/%x-%j.log",
        "dependency": f"afterok:{job.after}" if job.after else "",
        "mail-user": job.mail,
        "mail-type": "BEGIN,END,FAIL" if job.mail else "",
    }
    passed = {"NANOCHAT_SITE": site.name, "NANOCHAT_BASE_DIR": base, "NANOCHAT_PRESET": job.preset}
    passed |= {"NANOCHAT_SIGNAL_SECONDS": str(job.signal_seconds)} if job.name == "speedrun" else {}
    passed |= {"NANOCHAT_STAGES": job.stages} if job.stages else {}
    if any("," in value for value in passed.values()):
        raise UserError(f"Slurm cannot pass values with a comma on: {passed}; rename the directory")
    arguments = [f"--{name}={value}" for name, value in options.items() if value]
    exported = ",".join(f"{name}={value}" for name, value in passed.items())
    requeue = ["--requeue"] if job.name == "speedrun" else []
    return ["sbatch", "--parsable", *arguments, *requeue, f"--export=ALL,{exported}", f"slurm/{job.name}.sbatch"]


def distributed_launcher(processes: int) -> list[str]:
    """How the processes of a stage are started, before `-m nanochat …`: python itself for one, torchrun for more.

    In a Slurm job of several tasks every task starts a torchrun of its own, and they meet at the first node.
    """
    tasks = int(os.environ.get("SLURM_NTASKS", "1") or 1)
    if tasks == 1:
        alone = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return alone if processes > 1 else [sys.executable]
    job, host = os.environ["SLURM_JOB_ID"], _first_host(os.environ.get("SLURM_JOB_NODELIST", ""))
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    port = 20_000 + int(job) % 20_000
    per_task = max(1, processes)
    return [
        "srun", f"--ntasks={tasks}", "--kill-on-bad-exit=1", "--export=ALL", sys.executable, "-m", "torch.distributed.run",
        f"--nnodes={tasks}", f"--nproc_per_node={per_task}", "--rdzv_backend=c10d", f"--rdzv_endpoint={host}:{port}",
        f"--rdzv_id={job}.{attempt}",
    ]  # fmt: skip


def seconds_of(limit: str) -> int:
    """Of a time limit in Slurm's notation: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Raises UserError for another."""
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in (*parts, days or "0")) or len(parts) > 3:
        raise UserError(
            f"--time {limit!r} is no time limit; wanted minutes, hours:minutes:seconds or days-hours:minutes:seconds"
        )
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(unit * int(part) for unit, part in zip(units, parts, strict=False))


def _first_host(node_list: str) -> str:
    """The first name of Slurm's compressed list: gpu[07-09,12] → gpu07."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", node_list)
    return match[1] + (match[2] or "") if match else socket.gethostname()


def collective_timeout() -> timedelta:
    """How long a process waits for the others before it says that one is lost: NANOCHAT_TIMEOUT seconds, else ten minutes."""
    value = os.environ.get("NANOCHAT_TIMEOUT", "600")
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"NANOCHAT_TIMEOUT must be a whole number of seconds, got {value!r}")
    return timedelta(seconds=int(value))


def seconds_left() -> float | None:
    """Until the time limit of the Slurm job that this is in; None outside of one."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) - time.time() if end.isdigit() else None
