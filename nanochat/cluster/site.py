"""Site profiles: the settings of a cluster, in slurm/<name>.env, which the scripts in slurm/ read too."""

import getpass
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from string import Template

from nanochat.platform import environment
from nanochat.platform.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS_READ = ("venv", "timeout", "base_dir", "mail_user")  # further names of a profile, which only the scripts read


@dataclass(frozen=True)
class Site:
    """The profile of a cluster: NANOCHAT_ACCOUNT becomes `account`, and so on. An empty value leaves Slurm's default."""

    name: str
    modules: str = ""
    account: str = ""
    partition: str = ""
    cpu_partition: str = ""
    gres: str = ""
    gpus: str = ""
    cpus: str = ""
    memory: str = ""
    time: str = ""
    scratch: str = ""


def load_site(name: str, folder: Path = ROOT / "slurm") -> Site:
    """Read the profile slurm/<name>.env, or the file with the path `name`.

    Raises UserError for a missing profile (and lists the existing ones), a line that is not NAME=value, or an unknown name.
    """
    path = Path(name) if name.endswith(".env") else folder / f"{name}.env"
    if not path.is_file():
        existing = ", ".join(sorted(p.stem for p in folder.glob("*.env")))
        raise UserError(
            f"--site {name}: {path} does not exist; existing profiles: {existing}; copy slurm/generic.env for a new one"
        )
    known = [field.name for field in fields(Site) if field.name != "name"]
    values: dict[str, str] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"NANOCHAT_([A-Z_]+)=(.*)", line)
        if not match or match[1].lower() not in (*known, *SCRIPTS_READ):
            names = ", ".join(f"NANOCHAT_{value.upper()}" for value in (*known, *SCRIPTS_READ))
            raise UserError(f"{path}:{number}: expected NAME=value with one of {names}, got {line!r}")
        try:
            value = " ".join(shlex.split(match[2], comments=True))
        except ValueError as error:  # a quotation mark without its pair
            raise UserError(f"{path}:{number}: {match[2]!r} cannot be read ({error})") from error
        value = Template(value).safe_substitute({"USER": getpass.getuser(), **environment.all_variables()})
        if "$" in value:
            raise UserError(f"{path}:{number}: {value!r} refers to a variable that is not set")
        if match[1] == "GPUS" and value and not value.isdigit():
            raise UserError(f"{path}:{number}: NANOCHAT_GPUS must be a whole number, got {value!r}")
        values[match[1].lower()] = value
    profile = {name: value for name, value in values.items() if name in known}
    return Site(str(path.resolve()) if name.endswith(".env") else name, **profile)


def base_directory(site: Site) -> str:
    """The base directory of a job: NANOCHAT_BASE_DIR if it is set, else in the site's scratch, else the default."""
    configured = environment.configured_base_directory()
    if configured:
        return str(configured)
    return f"{site.scratch}/nanochat-cache" if site.scratch else str(Path.home() / ".cache" / "nanochat")


def account(option: str, site: Site, folder: Path = ROOT) -> str:
    """The account that Slurm charges: the option, else NANOCHAT_ACCOUNT of the environment or of .env.local, else the site's."""
    return option or _personal(folder, "NANOCHAT_ACCOUNT") or site.account


def mail_user(option: str, folder: Path = ROOT) -> str:
    """The address for Slurm's mail: the option, else MAIL_USER or NANOCHAT_MAIL_USER of the environment or of .env.local.

    Raises UserError for something that is not an address.
    """
    address = option or _personal(folder, "NANOCHAT_MAIL_USER", "MAIL_USER")
    if address and not re.fullmatch(r"[^\s@,]+@[^\s@,]+", address):
        raise UserError(f"--mail-user {address!r} is not an address; expected name@host")
    return address


def _personal(folder: Path, *names: str) -> str:
    """The value of the first of some variables that is set in the environment, else in the folder's .env.local; else "".

    The case of the variables' names does not matter.
    """
    sources = [environment.all_variables()]
    if (folder / ".env.local").is_file():
        pairs = (line.partition("=") for line in (folder / ".env.local").read_text("utf-8").splitlines())
        sources.append({name.strip().removeprefix("export "): value.strip(" \"'") for name, _, value in pairs})
    found = ({name.upper(): value for name, value in values.items()} for values in sources)
    return next((values[name] for values in found for name in names if values.get(name)), "")
