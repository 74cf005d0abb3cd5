"""The options of `nanochat speedrun`, `nanochat fetch` and `nanochat preflight`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from nanochat.options.presets import Changed, NamedRun, PresetName
from nanochat.options.ranges import AtLeast, Between


@dataclass(frozen=True)
class SpeedrunOptions(NamedRun):
    """Run the whole pipeline, from text to chat. Repeating the command continues where the last run stopped."""

    preset: PresetName = "cpu"
    """cpu (embedded data, minutes on two cores), tiny (a minute, to try out a machine), gpu (embedded data, 91M
    parameters), d20, d26 or d32"""
    first: Annotated[str, tyro.conf.arg(name="from")] = "data"
    """stage to begin with; earlier ones must have finished"""
    last: Annotated[str, tyro.conf.arg(name="to")] = "report"
    """stage to end with"""
    rl: bool = False
    """also run the stages rl and rl-eval: reinforcement learning on word problems"""
    custom_json: tuple[str, ...] = ()
    """files of further conversations for mid and sft, a JSON array of messages on each line"""
    processes: Annotated[int, Between(0, 1024)] = 0
    """training processes; 0: one per GPU, or one on a machine without GPUs"""
    device: str = "auto"
    """auto, cuda, cpu or mps"""
    changed: Changed = "refuse"
    """what to do if files of a finished stage have changed since: refuse, keep them and go on, or replace them by running it again"""


@dataclass(frozen=True)
class FetchOptions:
    """Download the data of a preset. Run it on a machine with internet; it resumes, and verifies every file."""

    preset: PresetName = "d20"
    """d20, d26 or d32: it determines the amount of pretraining text"""
    shards: Annotated[int, AtLeast(0)] = 0
    """shards of pretraining text, not counting the one for validation; 0: the preset's number"""
    only: tuple[str, ...] = ()
    """fetch only these assets"""
    workers: Annotated[int, Between(1, 1024)] = 8
    """files that are downloaded at the same time"""
    changed: Changed = "refuse"
    """what to do with files in the place of data that nanochat did not write: refuse, keep them as the data, or replace them"""


@dataclass(frozen=True)
class PreflightOptions(NamedRun):
    """Check data, GPUs, disk space, time and gate file before a run. Names every problem, the stages it affects and the remedy."""

    preset: PresetName = "d20"
    """tiny, cpu, gpu, d20, d26 or d32"""
    shards: Annotated[int, AtLeast(0)] = 0
    """shards of pretraining text; 0: the preset's number"""
    rl: bool = False
    """the run also has the stages rl and rl-eval"""
    data_only: bool = False
    """check only the data, as on the node that fetches them"""
