"""The options of `nanochat cluster submit|status`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nanochat.options.presets import Changed, NamedRun, NewestRun, PresetName
from nanochat.options.ranges import AtLeast, OrNegative

SIGNAL_SECONDS = 600  # an evaluation that is running must end before training can save


@dataclass(frozen=True)
class SubmitOptions(NamedRun):
    """Submit a job to Slurm. However a run ended, submitting it again continues it."""

    job: Annotated[Literal["speedrun", "gate", "bench", "profile"], tyro.conf.Positional] = "speedrun"
    """speedrun: the whole run; gate: choose kernels; bench: time them; profile: trace them"""
    site: str = ""
    """site profile: slurm/<site>.env, or the path of such a file; by default NANOCHAT_SITE, or else generic"""
    preset: PresetName = "d20"
    """cpu, tiny, gpu, d20, d26 or d32"""
    first: Annotated[str, tyro.conf.arg(name="from")] = ""
    """stage of the speedrun to begin with; earlier ones must have finished"""
    last: Annotated[str, tyro.conf.arg(name="to")] = ""
    """stage of the speedrun to end with"""
    rl: bool = False
    """the speedrun also has the stages rl and rl-eval"""
    custom_json: tuple[str, ...] = ()
    """files of further conversations for the speedrun's mid and sft, as in `nanochat speedrun`; compute nodes must see them too"""
    changed: Changed = "refuse"
    """what to do with files of your own in place of generated ones, as in `nanochat speedrun`"""
    after_gate: bool = False
    """submit the gate's job too, and begin only after it has succeeded"""
    nodes: Annotated[int, AtLeast(1)] = 1
    """number of nodes for the speedrun"""
    gpus: Annotated[int, OrNegative(meaning="the site's number")] = -1
    """GPUs per node; negative: the site's number, and none for the presets tiny and cpu"""
    tasks_per_node: Annotated[int, AtLeast(1)] = 1
    """torchrun launchers per node; more than one only without GPUs"""
    time: str = ""
    """time limit in Slurm's notation; by default the site's, and an hour for the gate and for the presets tiny and cpu. A run that does
    not finish in time is queued again until it is done"""
    signal_seconds: Annotated[int, AtLeast(0)] = SIGNAL_SECONDS
    """seconds before the time limit at which the run is told to save"""
    account: str = ""
    """account that Slurm charges; by default NANOCHAT_ACCOUNT of the environment or of .env.local, or else the site's"""
    mail_user: str = ""
    """address for Slurm's mail at begin, end and failure; by default MAIL_USER of the environment or of .env.local"""
    dry_run: bool = False
    """print the sbatch calls without submitting anything"""


@dataclass(frozen=True)
class StatusOptions(NewestRun):
    """Show the progress of a run (stages, step, tokens/s, time left) and, if Slurm is installed, its jobs."""
