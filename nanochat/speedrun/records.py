"""The records of finished stages: their commands, and hashes of the files that they read and wrote.

A record is valid as long as the same command would run on the same inputs, and the files that the stage wrote are unchanged.
"""

import hashlib
import json
import time
from pathlib import Path

from nanochat.platform.files import all_files, read_json, sha256_of, write_json
from nanochat.platform.paths import Paths
from nanochat.speedrun.stages import Stage


def record_path(paths: Paths, stage: Stage) -> Path:
    return paths.records / f"{stage.name}.json"


def write_record(paths: Paths, stage: Stage, command: list[str], made_from: str, seconds: float) -> dict:
    """Record a stage as finished after `seconds`; returns the record. made_from: hash_of the files of all earlier stages."""
    record = {
        "stage": stage.name,
        "command": command,
        "made_from": made_from,
        "made": hashes(paths, stage),
        "seconds": seconds,
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
