"""The options of `nanochat cluster submit|status`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nanochat.options.presets import PresetName
from nanochat.options.ranges import AtLeast

SIGNAL_SECONDS = 600  # before the time limit: a running evaluation must end before the run can save


@dataclass(frozen=True)
class SubmitOptions:
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
    nodes: Annotated[int, AtLeast(1)] = 1
    """nodes of the speedrun"""
    gpus: int = -1
    """GPUs of each node; negative: the site's number, and none for the presets of a CPU"""
    tasks_per_node: Annotated[int, AtLeast(1)] = 1
    """torchrun launchers of a node; more than one only without GPUs"""
    time: str = ""
    """time limit in Slurm's notation; the site's when not given. A run that does not fit is queued again until it is done"""
    signal_seconds: Annotated[int, AtLeast(0)] = SIGNAL_SECONDS
    """how long before the time limit the run is asked to save"""
    mail_user: str = ""
    """address that Slurm writes to at begin, end and failure; else MAIL_USER of the environment or of .env.local"""
    dry_run: bool = False
    """show the sbatch calls and do nothing"""


@dataclass(frozen=True)
class StatusOptions:
    """Show how far a run is, from the files it writes: stages, step, tokens/s, time left; and its jobs where Slurm is there."""
