"""Which tasks, items and tokens an evaluation has, beside those of its preset and of the results in the report."""

import math
from collections.abc import Collection
from dataclasses import asdict
from typing import Any, NamedTuple

from nanochat.options.evaluate import EvaluateBaseOptions, EvaluateChatOptions
from nanochat.options.presets import with_preset
from nanochat.platform.files import read_json
from nanochat.platform.paths import Paths, steps_in
from nanochat.platform.shapes import is_number

TASKS = ("tasks", "core_tasks")  # options with names of tasks; none stands for all
# options with a number, of which a negative one stands for all
AMOUNTS = ("max_per_task", "core_max_per_task", "max_tokens", "tokens")
LONGEST = 100  # characters of the names of tasks in the name of a file


class Scope(NamedTuple):
    """less: the options by which an evaluation has less than its preset or than the results in the report, with their values.
    kept: why the report keeps its results then; empty if it takes the new ones."""

    less: dict[str, str]
    kept: str

    @property
    def suffix(self) -> str:
        """What tells the table of an evaluation that has less from the other tables of the checkpoint."""
        values = {
            name: value if len(value) <= LONGEST else f"{len(value.split())}-of-them"
            for name, value in self.less.items()
        }
        return "".join(f"_{name}-{value.replace(' ', '+')}" for name, value in values.items())


def scope_of(
    options: EvaluateBaseOptions | EvaluateChatOptions, command: str, paths: Paths, every: Collection[str]
) -> Scope:
    """The scope of an evaluation by `command`, such as "evaluate base". every: the names of all tasks."""
    chosen = _flat(asdict(options))
    kept = _less(chosen, _reported(options, paths), every)
    less = _less(chosen, _flat(asdict(with_preset(type(options)(), command, options.preset))), every) | kept
    told = " and ".join(f"--{name} {value}" for name, value in kept.items())
    return Scope(less, f"they are of more than {told}" if kept else "")


def _reported(options: EvaluateBaseOptions | EvaluateChatOptions, paths: Paths) -> dict[str, Any]:
    """The settings of the results in the report; empty if it has none, or those of another model or an earlier checkpoint."""
    file = paths.section(f"{options.stage}-eval")
    section = read_json(file, {"settings": {str: object}})
    if section is None or section["settings"].get("hf_path") != asdict(options).get("hf_path"):
        return {}
    written = max((path.stat().st_mtime for path in steps_in(paths.checkpoints(options.stage)).values()), default=0.0)
    return _flat(section["settings"]) if written <= file.stat().st_mtime else {}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    nested = settings.get("task_options")
    return settings | nested if isinstance(nested, dict) else settings


def _less(chosen: dict[str, Any], other: dict[str, Any], every: Collection[str]) -> dict[str, str]:
    """The chosen options that make an evaluation smaller than one with other settings, which may come from any file."""
    less = {}
    for name in TASKS:
        if isinstance(other.get(name), list | tuple):
            missing = set(every) - set(chosen[name] or every)
            if missing & set(map(str, other[name] or every)):
                less[name] = " ".join(chosen[name])
    for name in AMOUNTS:
        if is_number(other.get(name)) and _amount(chosen[name]) < _amount(other[name]):
            less[name] = str(chosen[name])
    return {name.replace("_", "-"): value for name, value in less.items()}


def _amount(number: float) -> float:
    return number if number >= 0 else math.inf
