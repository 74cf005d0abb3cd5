"""The records of finished stages: their commands, and hashes of the files that they read and wrote.

A record is valid as long as the same command would run on the same inputs, and the files that the stage wrote are unchanged.
"""

import hashlib
import time
from pathlib import Path

from nanochat.platform.files import read_json, sha256_of, write_json
from nanochat.platform.paths import Paths
from nanochat.speedrun.stages import Stage


def record_path(paths: Paths, stage: Stage) -> Path:
    return paths.records / f"{stage.name}.json"


def write_record(paths: Paths, stage: Stage, command: list[str], made_from: str, seconds: float) -> dict:
    """Record a stage as finished after `seconds`; returns the record. made_from: the hash of all files of earlier stages."""
    record = {
        "stage": stage.name,
        "command": command,
        "made_from": made_from,
        "made": hash_of(stage.outputs(paths)),
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
    return record if record.get("made") == hash_of(stage.outputs(paths)) else None


def hash_of(files: list[Path]) -> str:
    """SHA-256 over the names and contents of files, and of all files in directories; a missing file has a hash of its own."""
    total = hashlib.sha256()
    for path in files:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_dir():
                continue
            total.update(str(file.relative_to(path.parent)).encode())
            total.update(bytes.fromhex(sha256_of(file)) if file.exists() else b"missing")
    return total.hexdigest()
