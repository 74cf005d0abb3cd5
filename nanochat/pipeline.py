"""The speedrun: every stage in order, each in a process of its own, each finished once.

A finished stage leaves a record with the hash of what it made and of what it was made from. The same command again skips
a stage whose record still holds, and starts an unfinished one anew, which then resumes from its newest checkpoint.
"""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from filelock import FileLock, Timeout

from nanochat.assets import faults
from nanochat.cluster import distributed_launcher
from nanochat.console import console, say
from nanochat.errors import TrainingStopped, UserError
from nanochat.paths import Paths, sha256_of
from nanochat.presets import EMBEDDED, PresetName
from nanochat.report.sections import write_json


@dataclass(frozen=True)
class Step:
    """A stage of the speedrun: the command that runs it and the files it makes."""

    name: str
    command: tuple[str, ...]
    outputs: Callable[[Paths], list[Path]]
    distributed: bool = False
    saves: bool = False  # resumes from a checkpoint of its own; others begin anew


def _newest_checkpoint(stage: str) -> Callable[[Paths], list[Path]]:
    def files(paths: Paths) -> list[Path]:
        found = sorted(paths.checkpoints(stage).glob("step_*/meta.json"))
        return [found[-1], found[-1].with_name("model.safetensors")] if found else [paths.checkpoints(stage) / "none"]

    return files


def _section(stage: str) -> Callable[[Paths], list[Path]]:
    return lambda paths: [paths.section(stage)]


STEPS = (
    Step("data", ("data", "generate"), lambda p: [p.words, p.text, p.chat_data, p.eval_bundle]),
    Step(
        "tokenizer", ("tokenizer", "train"), lambda p: [p.tokenizer / "tokenizer.json", p.tokenizer / "token_bytes.npy"]
    ),
    Step("tokenizer-eval", ("tokenizer", "eval"), _section("tokenizer-eval")),
    Step("base", ("train", "base"), _newest_checkpoint("base"), distributed=True, saves=True),
    Step("base-eval", ("evaluate", "base"), _section("base-eval"), distributed=True),
    Step("mid", ("train", "mid"), _newest_checkpoint("mid"), distributed=True, saves=True),
    Step("mid-eval", ("evaluate", "chat", "--stage", "mid"), _section("mid-eval"), distributed=True),
    Step("sft", ("train", "sft"), _newest_checkpoint("sft"), distributed=True, saves=True),
    Step("sft-eval", ("evaluate", "chat", "--stage", "sft"), _section("sft-eval"), distributed=True),
    Step("report", ("report",), lambda p: [p.report / "report.md", p.report / "report.html"]),
)
NAMES = tuple(step.name for step in STEPS)


@dataclass(frozen=True)
class SpeedrunConfig:
    """Run the whole pipeline, from text to chat. The same command again goes on where the last one stopped."""

    preset: PresetName = "cpu"
    """cpu (embedded data, minutes on two cores), tiny (a minute, to try a machine), d20, d26 or d32"""
    first: Annotated[str, tyro.conf.arg(name="from")] = NAMES[0]
    """stage to begin with; earlier ones must have finished"""
    last: Annotated[str, tyro.conf.arg(name="to")] = NAMES[-1]
    """stage to end with"""
    processes: int = 0
    """training processes; 0: one a GPU, or one on a machine without"""
    device: str = "auto"
    """auto, cuda, cpu or mps"""


def run_speedrun(config: SpeedrunConfig, paths: Paths) -> None:
    """Run what is not finished of the stages chosen. Raises UserError with the status of a stage that failed."""
    for option, name in (("--from", config.first), ("--to", config.last)):
        if name not in NAMES:
            raise UserError(f"{option} {name}: no such stage; there are: {', '.join(NAMES)}")
    first, last = NAMES.index(config.first), NAMES.index(config.last)
    if first > last:
        raise UserError(f"--from {config.first} comes after --to {config.last}; the order is: {', '.join(NAMES)}")
    preset = config.preset or "cpu"
    embedded = preset in EMBEDDED
    steps = [step for step in STEPS if embedded or step.name != "data"]
    processes = config.processes or max(1, torch.cuda.device_count() if config.device in ("auto", "cuda") else 1)
    started = time.perf_counter()
    with _only_one(paths), Stop(paths) as stop:
        if not embedded:
            for _, _, fault in faults(preset, paths):
                if fault:
                    raise UserError(f"{fault}; nanochat preflight names all that is missing")
        made = ""  # hash of all that earlier stages made
        for number, step in enumerate(steps, 1):
            command = _command(step, preset, config.device)
            chosen = first <= NAMES.index(step.name) <= last
            record = _valid_record(paths, step, command, made)
            if record is None and not chosen:
                if NAMES.index(step.name) > last:
                    break
                raise UserError(f"stage {step.name} has not finished (or what it made has changed); run without --from")
            if record is None:
                say(f"[{number}/{len(steps)}] {step.name}: nanochat {' '.join(command)}")
                record = _run(step, command, processes, paths, made, stop)
                say(f"[{number}/{len(steps)}] {step.name}: done in {record['seconds']:.0f} s")
            elif chosen:
                say(f"[{number}/{len(steps)}] {step.name}: finished before, skipped")
            made = hashlib.sha256((made + record["made"]).encode()).hexdigest()
    console.rule()
    say(f"all stages up to {config.last} are done, {time.perf_counter() - started:.0f} s for this command")


class Stop:
    """What USR1 and SIGTERM do: a training stage saves and ends, another is ended, and none is begun."""

    def __init__(self, paths: Paths):
        self.file, self.received, self.process = paths.stop, 0, None

    def __enter__(self) -> "Stop":
        self.file.unlink(missing_ok=True)
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGUSR1, signal.SIGTERM)}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.file.unlink(missing_ok=True)

    def _receive(self, number: int, frame) -> None:
        self.received = number
        self.file.write_text(f"{signal.Signals(number).name}\n", "utf-8")
        if self.process is not None:
            self.process.terminate()

    @contextmanager
    def watching(self, step: Step, process: subprocess.Popen) -> Iterator[None]:
        """A training stage reads the file, on whichever node; of others the process is ended."""
        self.process = None if step.saves else process
        if self.received and not step.saves:
            process.terminate()
        yield
        self.process = None

    def check(self, step: Step) -> None:
        """Raises TrainingStopped when a signal came."""
        if self.received:
            name = signal.Signals(self.received).name
            message = f"stopped by {name} in stage {step.name}; what was trained is saved, the same command goes on from there"
            raise TrainingStopped(message, 128 + self.received)


def _command(step: Step, preset: str, device: str) -> list[str]:
    command = list(step.command)
    if step.name not in ("data", "report", "tokenizer-eval"):
        command += ["--preset", preset]
    if step.distributed and device != "auto":
        command += ["--device", device]
    return command


def _run(step: Step, command: list[str], processes: int, paths: Paths, made_from: str, stop: Stop) -> dict:
    stop.check(step)
    launcher = distributed_launcher(processes) if step.distributed else [sys.executable]
    started = time.perf_counter()
    # stderr is read, so that the cause of a failure can be repeated at the end of a long run
    process = subprocess.Popen(
        [*launcher, "-m", "nanochat", *command], stderr=subprocess.PIPE, text=True, errors="replace"
    )
    cause = ""
    try:
        with stop.watching(step, process):
            for line in process.stderr:
                sys.stderr.write(line)
                sys.stderr.flush()
                if line.startswith("nanochat: error:") or not cause.startswith("nanochat: error:"):
                    cause = line.strip()
            status = process.wait()
    except KeyboardInterrupt:  # the terminal sent it to the stage too, which saves and ends
        status = process.wait()
    if status:
        stop.check(step)
        error = UserError(
            f"stage {step.name} failed with exit status {status}"
            + (f" ({cause.removeprefix('nanochat: error: ')})" if cause else "")
            + "; mend the cause and run the same command again: finished stages are skipped, this one resumes"
        )
        error.exit_status = status if status > 0 else 128 - status
        raise error
    record = {
        "stage": step.name,
        "command": command,
        "made_from": made_from,
        "made": _hash(step.outputs(paths)),
        "seconds": time.perf_counter() - started,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    write_json(paths.records / f"{step.name}.json", record)
    return record


def _valid_record(paths: Paths, step: Step, command: list[str], made_from: str) -> dict | None:
    """The record of a stage that was finished by this command, from these inputs, and whose files are unchanged."""
    try:
        record = json.loads((paths.records / f"{step.name}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    same = record.get("command") == command and record.get("made_from") == made_from
    return record if same and record.get("made") == _hash(step.outputs(paths)) else None


def _hash(files: list[Path]) -> str:
    """SHA-256 over names and contents; a missing file counts as such."""
    total = hashlib.sha256()
    for path in files:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_dir():
                continue
            total.update(str(file.relative_to(path.parent)).encode())
            if file.exists():
                total.update(sha256_of(file).digest())
            else:
                total.update(b"missing")
    return total.hexdigest()


@contextmanager
def _only_one(paths: Paths) -> Iterator[None]:
    lock = FileLock(paths.base / ".speedrun.lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise UserError(
            f"another speedrun is at work in {paths.base}; wait for it or set another NANOCHAT_BASE_DIR"
        ) from None
