"""The speedrun with processes that are killed, and its checkpoints resumed by fewer processes: parts of `python -m bench eight`."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import TextIO

from nanochat.cluster.slurm import distributed_launcher
from nanochat.options.presets import PRESETS
from nanochat.options.train import RunOptions
from nanochat.platform import environment
from nanochat.platform.console import say
from nanochat.platform.errors import UserError
from nanochat.platform.files import read_json, write_json
from nanochat.platform.paths import Paths, steps_in
from nanochat.platform.signals import end_with_parent
from nanochat.report.sections import read_section
from nanochat.speedrun.stages import STAGES
from nanochat.train.metrics import read_metrics

TRAINING = tuple(stage.name for stage in STAGES if stage.trains and not stage.optional)
KILLED = tuple(stage.name for stage in STAGES if stage.distributed and not stage.optional)
LOST = ("data_s", "log_s", "evaluate_s", "save_s")  # seconds in the records of training
GRACE = 60  # seconds in which an interrupted command saves and ends


@dataclass(frozen=True)
class KilledRun:
    """A run of a preset with embedded data, by a process on each GPU."""

    paths: Paths
    preset: str
    gpus: int
    device: str
    out: Path  # folder for logs, and for the starts so far
    deadline: float  # of time.monotonic(), at which what runs is interrupted

    @property
    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def speedrun(self, kill: Sequence[str], evaluation_seconds: float, last: str) -> dict:
        """Start the command until all stages up to `last` are done, and kill a process in each stage of `kill`, as `due` says.

        What an earlier call has done is not done again.
        """
        file = self.out / "speedrun.json"
        starts = (read_json(file, {"starts": [{"stage": str, "killed": bool}]}) or {"starts": []})["starts"]
        while self.left:
            past = {start["stage"] for start in starts if start["killed"]}
            past |= {name for name in KILLED if (self.paths.records / f"{name}.json").exists()}
            start = self.start(next((name for name in kill if name not in past), ""), evaluation_seconds, last)
            starts.append(start)
            write_json(file, {"starts": starts})  # so that the next call knows them if this one is killed
            if not start["killed"]:
                say(f"the last start ended with status {start['status']}: {start['said']}")
                break
        sections = {name: read_section(self.paths, name) for name in KILLED}
        return {
            "starts": starts,
            "done": bool(starts) and starts[-1]["status"] == 0,
            "training": {name: steps_of(self.paths, name) for name in TRAINING if self.paths.metrics(name).exists()},
            "stage_seconds": {name: section["seconds"] for name, section in sections.items() if section},
        }

    def start(self, stage: str, evaluation_seconds: float, last: str) -> dict:
        """Start the command, kill a process in a stage, or with "" none, and wait for the end; returns what happened."""
        log = self.out / "speedrun.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        options = f"--preset {self.preset} --run-name {self.paths.run_name} --processes {self.gpus} --to {last} --device {self.device}"
        command = [sys.executable, "-m", "nanochat", "speedrun", *options.split()]
        say(f"speedrun{f': a process of {stage} will be killed' if stage else ''}")
        started, killed = time.monotonic(), None
        with log.open("a", encoding="utf-8") as output:
            before = output.tell()
            process = started_here(command, output, variables(self.paths))
            try:
                while process.poll() is None and self.left:
                    time.sleep(0.02)
                    if not stage or killed or not runs(log, before, stage):
                        continue
                    ranks = ranks_of(process.pid, self.gpus)
                    if ranks and self.due(stage, processor_seconds(ranks[-1]), evaluation_seconds):
                        os.kill(ranks[-1], signal.SIGKILL)
                        killed = time.monotonic()
                interrupted = end(process)
            finally:
                process.kill()
        ended = time.monotonic()
        said = log.read_text("utf-8", errors="replace").strip().splitlines()
        return {
            "stage": stage,
            "killed": killed is not None,
            "interrupted": interrupted,
            "status": process.returncode,
            "seconds": ended - started,
            "seconds_from_kill_to_end": ended - killed if killed else None,
            "steps": {name: len(read_metrics(self.paths.metrics(name), "loss")) for name in TRAINING},
            "said": said[-1][:500] if said else "",
        }

    def due(self, stage: str, seconds: float, evaluation_seconds: float) -> bool:
        """Whether to kill a process of a stage that has taken so many seconds of a processor: half-way from the first save to the
        second or when more than half is done, or so long into an evaluation."""
        if stage not in TRAINING:
            return seconds >= evaluation_seconds
        run = PRESETS[self.preset].get(f"train {stage}", {}).get("run", {})
        every = run.get("save_every", RunOptions().save_every)
        steps = read_metrics(self.paths.metrics(stage), "loss", "progress")
        return bool(steps) and (len(steps) >= 1.5 * every or steps[-1]["progress"] > 0.6)

    def fewer(self, counts: Sequence[int]) -> dict:
        """Resume the checkpoint before the last one of pretraining with so many processes, all at once, each in a copy of the run.

        Raises UserError if there is none.
        """
        checkpoints = steps_in(self.paths.checkpoints("base"))
        if len(checkpoints) < 2:
            raise UserError(
                f"{self.paths.checkpoints('base')} has {len(checkpoints)} checkpoints, wanted two; run --parts speedrun before"
            )
        from_step, first, running = list(checkpoints)[-2], 0, []
        for count in counts:
            # under another base directory: a run that is resumed keeps its name
            copy = replace(self.paths, base=self.paths.base.with_name(f"{self.paths.base.name}-{count}"))
            shutil.rmtree(copy.base, ignore_errors=True)
            for part in (self.paths.embedded, self.paths.tokenizer, checkpoints[from_step]):
                shutil.copytree(part, copy.run / part.relative_to(self.paths.run))
            copy.metrics("base").parent.mkdir()
            shutil.copy(self.paths.metrics("base"), copy.metrics("base"))
            options = f"--preset {self.preset} --run-name {copy.run_name} --device {self.device}"
            command = [*distributed_launcher(count), "-m", "nanochat", "train", "base", *options.split()]
            cards = {}
            if self.device == "cuda":
                cards["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first, first + count)))
            first += count
            with (self.out / f"fewer-{count}.log").open("w", encoding="utf-8") as log:
                process = started_here(command, log, variables(copy, **cards))
            running.append((copy, process))
        for _, process in running:
            while process.poll() is None and self.left:
                time.sleep(0.1)
            end(process)
        return {"rows": [self.compared(from_step, *one) for one in zip(counts, running, strict=True)]}

    def compared(self, from_step: int, count: int, resumed: tuple[Paths, subprocess.Popen]) -> dict:
        """What a resumed copy of the run trained, beside what the run itself did in the same steps; the copy is removed."""
        copy, process = resumed
        theirs, ours = (
            {record["step"]: record["loss"] for record in read_metrics(paths.metrics("base"), "loss")}
            for paths in (self.paths, copy)
        )
        again = [step for step in ours if step >= from_step and step in theirs] if process.returncode == 0 else []
        found = {
            "from_gpus": self.gpus,
            "gpus": count,
            "from_step": from_step,
            "status": process.returncode,
            "steps_again": len(again),
            "mean_loss": mean(ours[step] for step in again) if again else None,
            "mean_loss_of_all_gpus": mean(theirs[step] for step in again) if again else None,
        } | steps_of(copy, "base", from_step)
        shutil.rmtree(copy.base)
        return found


def variables(paths: Paths, **more: str) -> dict[str, str]:
    """The environment of a command that works under the base directory of these paths, and does not wait long for a lost process."""
    return environment.all_variables() | {"NANOCHAT_BASE_DIR": str(paths.base), "NANOCHAT_TIMEOUT": "60"} | more


def started_here(command: list[str], log: TextIO, variables: dict[str, str]) -> subprocess.Popen:
    """A process that writes to a log and ends when this one is killed."""
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=variables, preexec_fn=partial(end_with_parent, os.getpid())
    )


def end(process: subprocess.Popen) -> bool:
    """Ask a process to save and end if it still runs, and wait until it has ended; returns whether it still ran."""
    interrupted = process.poll() is None
    if interrupted:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            say(f"{' '.join(process.args)} did not end within {GRACE} s after it was asked to, and is killed")
            process.kill()
            process.wait()
    return interrupted


def runs(log: Path, since: int, stage: str) -> bool:
    """Whether a stage is the one that the command has started last, as its log says: [4/10] base: nanochat train base …"""
    with log.open("rb") as file:
        file.seek(since)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    titles = [line.partition("] ")[2] for line in lines if line.startswith("[") and ": nanochat " in line]
    return bool(titles) and titles[-1].startswith(f"{stage}: ")


def ranks_of(speedrun: int, count: int) -> list[int]:
    """The processes of the stage that runs, once all of them are there; empty before."""
    launchers = children(speedrun)
    ranks = children(launchers[-1]) if launchers and count > 1 else launchers
    return ranks if len(ranks) >= count else []


def children(parent: int) -> list[int]:
    """The processes that a process has started and that still run, in the order of their ids."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            before, _, after = status.read_text().rpartition(") ")  # the name may have brackets
        except OSError:  # it has ended
            continue
        if after.split()[1] == str(parent):
            found.append(int(before.partition(" ")[0]))
    return sorted(found)


def processor_seconds(process: int) -> float:
    """The seconds of processors that a process has taken; 0 for one that has ended."""
    try:
        user, system = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()[11:13]
    except OSError:
        return 0.0
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def steps_of(paths: Paths, stage: str, first: int = 0) -> dict:
    """What the records of a training stage say from a step on: steps that are missing or there twice, and seconds that a thousand
    steps lose. Seconds of which there are no records are None."""
    records = [record for record in read_metrics(paths.metrics(stage)) if record["step"] >= first]
    steps = [record for record in records if "loss" in record]
    numbers = [record["step"] for record in steps]
    lost = {key: [record[key] for record in records if key in record] for key in LOST}
    return {
        "steps": len(steps),
        "missing": sorted(set(range(first, max(numbers, default=first - 1) + 1)) - set(numbers)),
        "double": sorted({number for number in numbers if numbers.count(number) > 1}),
        "tokens_per_second": median(record["tokens_per_second"] for record in steps) if steps else None,
        "step_s": median(record["dt"] for record in steps) if steps else None,
        "seconds_of_1000_steps": {key: 1000 * sum(s) / len(steps) if s and steps else None for key, s in lost.items()},
        "newest_results": ([record for record in records if "val_bpb" in record or "val_loss" in record] or [None])[-1],
    }
