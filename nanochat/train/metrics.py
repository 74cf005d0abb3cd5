"""What training says while it runs: a line a step, a JSONL file always, wandb when asked for. Never alters training."""

import json
import os
import warnings
from pathlib import Path

from nanochat.console import say


class MetricsLog:
    """Appends records to a JSONL file, flushed one by one; on resume the records from the resumed step on are dropped."""

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(path) if record["step"] < resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), "utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            warnings.warn(f"cannot write {self.path}: {error}; training goes on", stacklevel=2)

    def close(self) -> None:
        try:
            self._file.close()
        except OSError:  # a full disk, said already
            pass


def read_metrics(path: Path) -> list[dict]:
    """The whole records of a metrics file; a line cut by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


class WandbLog:
    """The same records to wandb; any failure there is said once and ignored."""

    def __init__(self, run: str, mode: str, stage: str, settings: dict):
        self._run = None
        if not run:
            return
        try:
            import wandb

            self._run = wandb.init(project="nanochat", name=f"{run}-{stage}", config=settings, mode=mode)
        except Exception as error:  # whatever a logger does, training goes on
            self._give_up(error)

    def write(self, record: dict) -> None:
        if self._run is None:
            return
        try:
            self._run.log(record, step=record["step"])
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        say(
            f"wandb does not log this run ({str(error).splitlines()[0] if str(error) else repr(error)}); training goes on"
        )
