"""The stages of the speedrun, in order. A new stage is one line here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths, steps_in


@dataclass(frozen=True)
class Stage:
    """A stage: the command that runs it, and the files that it writes."""

    name: str
    command: tuple[str, ...]
    outputs: Callable[[Paths], list[Path]]
    distributed: bool = False  # takes --device, and runs in one process per GPU
    trains: bool = False  # saves on a signal and resumes from its checkpoint; other stages start again
    has_preset: bool = True  # takes --preset
    asks_about_changes: bool = False  # takes --changed
    reads_custom: bool = False  # takes --custom-json
    optional: bool = False  # runs only if the user asks for it
    may_be_replaced: bool = False  # a user may put files of their own in place of its outputs; others are made again


def _newest_checkpoint(stage: str) -> Callable[[Paths], list[Path]]:
    def files(paths: Paths) -> list[Path]:
        newest = [paths.checkpoints(stage) / "none", *steps_in(paths.checkpoints(stage)).values()][-1]
        return [newest / "meta.json", newest / "model.safetensors"]

    return files


def _section(stage: str) -> Callable[[Paths], list[Path]]:
    return lambda paths: [paths.section(stage)]


def _tokenizer(paths: Paths) -> list[Path]:
    return [paths.tokenizer / "tokenizer.json", paths.tokenizer / "token_bytes.npy"]


STAGES = (
    Stage(
        "data",
        ("data", "generate"),
        lambda p: [p.embedded],
        has_preset=False,
        asks_about_changes=True,
        may_be_replaced=True,
    ),
    Stage("tokenizer", ("tokenizer", "train"), _tokenizer, may_be_replaced=True),
    Stage("tokenizer-eval", ("tokenizer", "eval"), _section("tokenizer-eval"), has_preset=False),
    Stage("base", ("train", "base"), _newest_checkpoint("base"), distributed=True, trains=True),
    Stage("base-eval", ("evaluate", "base"), _section("base-eval"), distributed=True),
    Stage("mid", ("train", "mid"), _newest_checkpoint("mid"), distributed=True, trains=True, reads_custom=True),
    Stage("mid-eval", ("evaluate", "chat", "--stage", "mid"), _section("mid-eval"), distributed=True),
    Stage("sft", ("train", "sft"), _newest_checkpoint("sft"), distributed=True, trains=True, reads_custom=True),
    Stage("sft-eval", ("evaluate", "chat", "--stage", "sft"), _section("sft-eval"), distributed=True),
    Stage("rl", ("train", "rl"), _newest_checkpoint("rl"), distributed=True, trains=True, optional=True),
    Stage("rl-eval", ("evaluate", "chat", "--stage", "rl"), _section("rl-eval"), distributed=True, optional=True),
    Stage("report", ("report",), lambda p: [p.report / "report.md", p.report / "report.html"], has_preset=False),
)
NAMES = tuple(stage.name for stage in STAGES)


def check_stage(option: str, name: str, rl: bool) -> None:
    """Raise UserError for the name of a stage that there is not, or that runs only with --rl if this was not given."""
    if name not in NAMES:
        raise UserError(f"{option} {name}: no such stage; choose from: {', '.join(NAMES)}")
    if STAGES[NAMES.index(name)].optional and not rl:
        raise UserError(f"{option} {name}: this stage runs only with --rl; add it")


def check_order(first: str, last: str) -> None:
    """Raise UserError if the first stage comes after the last one."""
    if NAMES.index(first) > NAMES.index(last):
        raise UserError(f"--from {first} comes after --to {last}; the order is: {', '.join(NAMES)}")


def command_of(stage: Stage, preset: str, device: str, run_name: str, custom_json: Sequence[str] = ()) -> list[str]:
    """The words after `nanochat` that run a stage."""
    command = [*stage.command]
    if stage.has_preset:
        command += ["--preset", preset]
    if not stage.has_preset or run_name != preset:
        command += ["--run-name", run_name]
    if stage.distributed and device != "auto":
        command += ["--device", device]
    if stage.reads_custom and custom_json:
        command += ["--custom-json", *custom_json]
    return command
