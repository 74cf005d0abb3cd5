"""The records of finished stages: their commands, and hashes of the files that they read and wrote.

A record is valid as long as the same command would run on the same inputs, and the files that the stage wrote are unchanged.
"""

import hashlib
import json
import time
from pathlib import Path

from nanochat.platform.environment import slurm_job_id, slurm_restarts
from nanochat.platform.errors import UserError
from nanochat.platform.files import all_files, read_json, sha256_of, write_json
from nanochat.platform.paths import Paths, steps_in
from nanochat.report.sections import read_section
from nanochat.speedrun.stages import STAGES, Stage

FRUITLESS = 3  # starts of a job in a row that made no progress, after which it is not started again


def record_path(paths: Paths, stage: Stage) -> Path:
    return paths.records / f"{stage.name}.json"


def write_record(paths: Paths, stage: Stage, command: list[str], made_from: str, seconds: float) -> dict:
    """Record a stage as finished; returns the record. made_from: hash_of the files of all earlier stages.

    seconds: of the start that finished it; a stage that was resumed knows more, and writes it to its section of the report.
    """
    section = read_section(paths, stage.name)
    record = {
        "stage": stage.name,
        "command": command,
        "made_from": made_from,
        "made": hashes(paths, stage),
        "seconds": max(seconds, section["seconds"] if section else 0.0),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    write_json(record_path(paths, stage), record)
    return record


def valid_record(paths: Paths, stage: Stage, command: list[str], made_from: str) -> dict | None:
    """The record of a stage if it is still valid, else None."""
    record = read_json(record_path(paths, stage))
    if record is None or record.get("command") != command or record.get("made_from") != made_from:
        return None
    return record if record.get("made") == hashes(paths, stage) else None


def count_start(paths: Paths) -> None:
    """Note that a job of a cluster which was queued again starts the run; does nothing for any other command.

    Raises UserError when its last FRUITLESS starts have trained no step and finished no stage: the next one would not either.
    """
    job = slurm_job_id()
    if not job or not slurm_restarts():
        return
    steps = {stage.name: [0, *steps_in(paths.checkpoints(stage.name))][-1] for stage in STAGES if stage.trains}
    finished = {path.stem: path.stat().st_mtime_ns for path in paths.records.glob("*.json")}
    now = {"job": job, "progress": {"steps": steps, "finished": finished}, "starts": 1}
    before = read_json(paths.starts, {"job": str, "progress": {str: object}, "starts": int})
    if before and (before["job"], before["progress"]) == (job, now["progress"]):
        now["starts"] = before["starts"] + 1
    if now["starts"] > FRUITLESS:
        raise UserError(
            f"job {job} was queued again and again and started {FRUITLESS} times in a row without training a step or finishing a "
            "stage; each start ends before it gets that far, and its output says why: raise --time, or lower --signal-seconds, and "
            "submit again"
        )
    write_json(paths.starts, now)


def changed_files(paths: Paths, stage: Stage) -> list[Path]:
    """The files of a finished stage that a user has changed or added since, and that running the stage again would replace.

    A training stage replaces none: it resumes from its newest checkpoint, whichever that is. What other commands write too,
    sections and the report, is made again.
    """
    record = read_json(record_path(paths, stage))
    if record is None or not stage.may_be_replaced or not isinstance(record.get("made"), dict):
        return []
    return [paths.run / name for name, digest in hashes(paths, stage).items() if record["made"].get(name) != digest]


def hashes(paths: Paths, stage: Stage) -> dict[str, str]:
    """The SHA-256 of each file that a stage has written, by its path in the directory of the run."""
    outputs = stage.outputs(paths)
    files = [file for path in outputs for file in (all_files(path) if path.is_dir() else [path])]
    return {str(file.relative_to(paths.run)): sha256_of(file) for file in files if file.is_file()}


def hash_of(*parts: object) -> str:
    """SHA-256 over values that JSON knows, in this order."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
