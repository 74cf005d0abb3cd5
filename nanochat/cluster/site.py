"""The profile of a site: the settings of a cluster, in slurm/<name>.env. slurm/profile.sh reads it, for the scripts there too."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from nanochat.platform import environment
from nanochat.platform.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Site:
    """The settings of a site: NANOCHAT_ACCOUNT becomes `account`, and so on. An empty value leaves Slurm's default."""

    name: str
    modules: str
    partition: str
    cpu_partition: str
    gres: str
    gpus: str
    cpus: str
    memory: str
    time: str
    scratch: str
    account: str
    mail_user: str
    base_dir: str
    venv: str
    timeout: str


def load_site(name: str, folder: Path = ROOT, account: str = "", mail_user: str = "") -> Site:
    """Read the profile slurm/<name>.env of a folder, or the file with the path `name`, and what the user sets in place of it.

    The account, the address for mail and the base directory are those given here, else those of the environment, else those of the
    folder's .env.local, else the profile's. Raises UserError for a missing profile, a line that cannot be read, and a bad value.
    """
    name = str(Path(name).absolute()) if name.endswith(".env") else name
    call = [shutil.which("bash") or "/bin/bash", "slurm/profile.sh", name]
    for option, key, value in (("--account", "ACCOUNT", account), ("--mail-user", "MAIL_USER", mail_user)):
        call += [option, key, value] if value else []
    base = environment.configured_base_directory()
    variables = environment.all_variables() | ({"NANOCHAT_BASE_DIR": str(base)} if base else {})
    done = subprocess.run(
        call, cwd=folder, env=variables, capture_output=True, encoding="utf-8", errors="surrogateescape"
    )
    if done.returncode:
        raise UserError(done.stderr.strip())
    pairs = (line.partition("=") for line in done.stdout.rstrip("\n").split("\n"))
    return Site(name, **{key.removeprefix("NANOCHAT_").lower(): value for key, _, value in pairs})


def base_directory(site: Site) -> str:
    """The base directory of a job: NANOCHAT_BASE_DIR if it is set, else in the site's scratch, else the default."""
    return site.base_dir or str(Path.home() / ".cache" / "nanochat")
