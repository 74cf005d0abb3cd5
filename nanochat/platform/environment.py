"""Every environment variable that nanochat reads, in one place. A test enforces that no other file reads one."""

import os
import time
from datetime import timedelta
from pathlib import Path

from nanochat.platform.errors import UserError


def configured_base_directory() -> Path | None:
    """NANOCHAT_BASE_DIR as an absolute path; None when it is not set."""
    return _path_in("NANOCHAT_BASE_DIR")


def _path_in(variable: str) -> Path | None:
    """The absolute path in a variable, with ~ replaced; None when it is not set. Raises UserError for an unknown user."""
    value = os.environ.get(variable)
    try:
        return Path(value).expanduser().absolute() if value else None
    except RuntimeError as error:
        raise UserError(f"{variable}={value}: there is no such user; give an absolute path") from error


def home_directory() -> Path | None:
    """HOME, or None when it is not set."""
    value = os.environ.get("HOME")
    return Path(value) if value else None


def collective_timeout() -> timedelta:
    """How long a process waits for others before it reports one as lost: NANOCHAT_TIMEOUT in seconds, ten minutes by default.

    Raises UserError when the variable is not a whole number of seconds.
    """
    value = os.environ.get("NANOCHAT_TIMEOUT", "600")
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"NANOCHAT_TIMEOUT must be a whole number of seconds, got {value!r}")
    return timedelta(seconds=int(value))


def kernel_library() -> Path | None:
    """NANOCHAT_AOT: the library of the kernels that CMake built, or the folder it is in; None where Triton compiles them."""
    return _path_in("NANOCHAT_AOT")


def processes_here() -> int:
    """LOCAL_WORLD_SIZE, which torchrun sets: how many processes of a run this machine has; 1 for a run of one process."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def library_path() -> str:
    """LD_LIBRARY_PATH, where Python itself may need libraries from."""
    return os.environ.get("LD_LIBRARY_PATH", "")


def all_variables() -> dict[str, str]:
    """The whole environment, for a child process and for the variables that a site profile refers to."""
    return dict(os.environ)


def site_name() -> str:
    """NANOCHAT_SITE, the site profile of this cluster; `generic` when it is not set."""
    return os.environ.get("NANOCHAT_SITE") or "generic"


def slurm_tasks() -> int:
    """The number of tasks of the Slurm job; 1 outside of a job, where a shell may still have the variables of one."""
    return int(os.environ.get("SLURM_NTASKS") or 1) if slurm_job_id() else 1


def slurm_job_id() -> str:
    """The id of the Slurm job; empty outside of a job."""
    return os.environ.get("SLURM_JOB_ID", "")


def slurm_restarts() -> int:
    """How often the Slurm job was queued again."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def slurm_job() -> tuple[int, str, int]:
    """The Slurm job's id, its compressed list of nodes, and the number of times it was requeued."""
    return (
        int(os.environ["SLURM_JOB_ID"]),
        os.environ.get("SLURM_JOB_NODELIST", ""),
        slurm_restarts(),
    )


def slurm_seconds_left() -> float | None:
    """Seconds until the time limit of the Slurm job; None outside of a job."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) - time.time() if end.isdigit() else None
