"""The metrics of training: always a JSONL file, and wandb if the user names a run. An error of either does not stop training."""

import contextlib
import json
import warnings
from pathlib import Path
from typing import TextIO

from nanochat.platform.console import say
from nanochat.platform.errors import UserError
from nanochat.platform.files import json_lines, write_atomically
from nanochat.platform.shapes import check_shape


class Metrics:
    """Writes records to a JSONL file, flushing each, and to wandb. It writes nothing until it is opened."""

    def __init__(self, path: Path):
        self.path = path
        self.error: OSError | None = None  # why the file cannot be written, while that is so
        self._file: TextIO | None = None
        self._wandb = WandbLog()

    def open(self, resume_step: int, wandb_run: str, wandb_mode: str, stage: str, settings: dict) -> None:
        """Drop the records from the resumed step on, which will be written again; start the wandb run if it has a name."""
        kept = [record for record in read_metrics(self.path) if record["step"] < resume_step]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._wandb.open(wandb_run, wandb_mode, stage, settings)

    def write(self, record: dict) -> None:
        """Append a record, a dictionary with the key "step"."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            self.error = None
        except OSError as error:
            self.error = error
            warnings.warn(f"cannot write {self.path}: {error}; training continues", stacklevel=2)
        self._wandb.write(record)

    def close(self) -> None:
        self._wandb.close()
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk has been reported by write
                self._file.close()


def read_metrics(path: Path, *names: str) -> list[dict]:
    """The records of a metrics file that have a number for each of the names, and for "step". No file gives no records.

    A line that a kill has cut off, or of another shape, is left out.
    """
    if not path.exists():
        return []
    return [record for _, record in json_lines(path) if _has_numbers(record, ("step", *names))]


def _has_numbers(value: object, names: tuple[str, ...]) -> bool:
    try:
        check_shape(value, dict.fromkeys(names, float), "")
    except UserError:
        return False
    return True


class WandbLog:
    """Writes records to wandb, if a run was opened. The first error of wandb is printed, and nothing more is written."""

    def __init__(self) -> None:
        self._run = None

    def open(self, run: str, mode: str, stage: str, settings: dict) -> None:
        if not run:
            return
        try:
            import wandb

            self._run = wandb.init(project="nanochat", name=f"{run}-{stage}", config=settings, mode=mode)
        except Exception as error:  # whatever the error of a logger is, training continues
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
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        say(f"wandb does not log this run ({reason}); training continues")
