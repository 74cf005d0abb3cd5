"""`nanochat speedrun`: runs every stage in order, each in processes of its own.

The same command skips stages whose records are still valid. A training stage that was interrupted resumes from its newest
checkpoint; any other stage starts again.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from nanochat.cluster.slurm import distributed_launcher
from nanochat.options.presets import EMBEDDED
from nanochat.options.speedrun import SpeedrunOptions
from nanochat.platform import environment
from nanochat.platform.console import console, output, say
from nanochat.platform.distributed import pick_device
from nanochat.platform.errors import TrainingStopped, UserError
from nanochat.platform.files import name_some, sha256_of
from nanochat.platform.lock import locked
from nanochat.platform.paths import Paths
from nanochat.platform.signals import end_with_parent, handled
from nanochat.report.sections import read_samples
from nanochat.speedrun.assets import problems, remedy
from nanochat.speedrun.records import changed_files, hash_of, valid_record, write_record
from nanochat.speedrun.stages import NAMES, STAGES, Stage, check_order, check_stage, command_of
from nanochat.tasks import CustomJSON

ERROR = "nanochat: error: "  # how the last line of a command that fails begins
# seconds that torchrun (torch 2.12 or newer) leaves its processes to save after a signal, where it would kill them after 30
PATIENCE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}


def speedrun(options: SpeedrunOptions, paths: Paths) -> None:
    """Run the stages that are not finished; after the last one, show a conversation.

    Raises UserError, with its exit status, when a stage fails, and TrainingStopped after a signal.
    """
    with output.may_fail():
        run_stages(options, paths)
        if options.last == NAMES[-1]:
            for name, text in read_samples(paths):
                say(f"{name}: {text}")
            say(f"\nThe report is {paths.report / 'report.html'}. Chat on with: nanochat chat{paths.as_option}")


def run_stages(options: SpeedrunOptions, paths: Paths, stages: Sequence[Stage] = STAGES) -> None:
    """Run the stages from options.first to options.last that are not finished."""
    first, last = _chosen_range(options)
    pick_device(options.device)  # before a stage is run
    preset = options.preset or "cpu"
    embedded = preset in EMBEDDED
    stages = [stage for stage in stages if (embedded or stage.name != "data") and (options.rl or not stage.optional)]
    processes = options.processes or max(1, torch.cuda.device_count() if options.device in ("auto", "cuda") else 1)
    started = time.perf_counter()
    missing = {asset: problem for asset, _, problem in problems(preset, paths) if problem}
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{next(iter(missing.values()))}{more}; {remedy(preset, list(missing))}; nanochat preflight names everything that is "
            "missing"
        )
    for path in options.custom_json:
        CustomJSON(path)  # a mistake in it is found now, and not after pretraining
    custom = [sha256_of(Path(path)) for path in options.custom_json]
    with locked(paths.lock("speedrun"), "speedrun"), Stop(paths).handling() as stop:
        made_from = ""  # hash of all files that earlier stages wrote
        for number, stage in enumerate(stages, 1):
            if NAMES.index(stage.name) > last:
                break
            command = command_of(stage, preset, options.device, paths.run_name, options.custom_json)
            if stage.reads_custom and custom:
                made_from = hash_of(made_from, custom)
            record = valid_record(paths, stage, command, made_from)
            title = f"[{number}/{len(stages)}] {stage.name}"
            changed = changed_files(paths, stage) if record is None else []
            if changed and options.changed == "refuse":
                raise UserError(
                    f"stage {stage.name} has finished, and these files of it have changed since: {name_some(changed)}; to keep "
                    "them and go on, add --changed keep; to replace them by running the stage again, add --changed replace"
                )
            if changed and options.changed == "keep":
                record = write_record(paths, stage, command, made_from, 0.0)
                say(f"{title}: kept with the files that have changed: {name_some(changed)}")
            if first <= NAMES.index(stage.name):
                if record is None:
                    say(f"{title}: nanochat {' '.join(command)}")
                    told = ["--changed", options.changed] if stage.asks_about_changes else []
                    seconds = _run(stage, command + told, processes, stop)
                    record = write_record(paths, stage, command, made_from, seconds)
                    say(f"{title}: done in {record['seconds']:.0f} s")
                else:
                    say(f"{title}: finished before, skipped")
            elif record is None:
                raise UserError(
                    f"stage {stage.name} has not finished (or its files are missing, or earlier stages ran again since); run "
                    "without --from"
                )
            made_from = hash_of(made_from, record["made"])
    console.rule()
    say(f"all stages up to {options.last} are done; this command took {time.perf_counter() - started:.0f} s")


def _chosen_range(options: SpeedrunOptions) -> tuple[int, int]:
    """The indices of the first and the last stage to run. Raises UserError for an unknown name and for a wrong order."""
    for option, name in (("--from", options.first), ("--to", options.last)):
        check_stage(option, name, options.rl)
    check_order(options.first, options.last)
    return NAMES.index(options.first), NAMES.index(options.last)


class Stop:
    """Handles signals that ask to end: a training stage saves and ends, any other stage is terminated, and no further stage starts.

    The first signal is passed on to training through a file under the base directory, because the processes of a stage may run on
    other nodes. Each further one terminates the stage.
    """

    def __init__(self, paths: Paths):
        self.file, self.received, self.process, self.asks = paths.stop, 0, None, False

    @contextmanager
    def handling(self) -> Iterator["Stop"]:
        """Handle the signals while the block runs."""
        self.file.unlink(missing_ok=True)
        try:
            with handled(self._receive):
                yield self
        finally:
            self.file.unlink(missing_ok=True)

    def _receive(self, number: int, frame) -> None:
        again, self.received = self.received, number
        try:
            self.file.write_text(f"{signal.Signals(number).name}\n", "utf-8")
        except OSError:  # a full disk: the stage cannot be asked
            again = number
        if self.process is None and again:
            raise KeyboardInterrupt
        if self.process is not None and (again or not self.asks):
            self.process.terminate()

    @contextmanager
    def watching(self, stage: Stage, process: subprocess.Popen) -> Iterator[None]:
        """While the block waits for a stage: a signal terminates its process, unless it is a training stage, which sees the file."""
        self.process, self.asks = process, stage.trains
        if self.received and not stage.trains:
            process.terminate()
        yield
        self.process = None

    def check(self, stage: Stage, reason: str = "") -> None:
        """Raise TrainingStopped if a signal has been received. reason: what the stage said at its end."""
        if self.received:
            message = f"stopped by {signal.Signals(self.received).name} in stage {stage.name}"
            remedy = f": {reason}" if reason else "; the same command continues there"
            raise TrainingStopped(message + remedy, 128 + self.received)


def _run(stage: Stage, command: list[str], processes: int, stop: Stop) -> float:
    """Run a stage in processes of its own; returns the seconds that it took. Raises UserError with its exit status when it fails."""
    stop.check(stage)
    launcher = distributed_launcher(processes) if stage.distributed else [sys.executable]
    started = time.perf_counter()
    # stderr goes through this process, so that the error of a failed stage can be repeated at the end of a long run
    process = subprocess.Popen(
        [*launcher, "-m", "nanochat", *command],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=PATIENCE | environment.all_variables(),
        preexec_fn=partial(end_with_parent, os.getpid()),
    )
    error, last = "", ""
    with stop.watching(stage, process):
        for line in process.stderr:
            with suppress(OSError):  # of a closed terminal or a full disk, which must not end the stage
                sys.stderr.write(line)
                sys.stderr.flush()
            last = line.strip() if any(map(str.isalnum, line)) else last  # torchrun ends with a ruler
            if not error and line.startswith(ERROR):
                error = last.removeprefix(ERROR)
        status = process.wait()
    if status:
        stop.check(stage, error)
        reason = error or last
        failure = UserError(
            f"stage {stage.name} failed with exit status {status}{f' ({reason})' if reason else ''}; fix the cause and run the same "
            "command again: finished stages are skipped, and this one resumes"
        )
        failure.exit_status = status if status > 0 else 128 - status
        raise failure
    return time.perf_counter() - started
