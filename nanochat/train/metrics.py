"""The metrics of training: always a JSONL file, and wandb if the user names a run. An error of either does not stop training."""

import contextlib
import json
import warnings
from io import FileIO
from pathlib import Path

from nanochat.platform.console import say
from nanochat.platform.files import json_lines, write_atomically
from nanochat.platform.shapes import is_number


class Metrics:
    """Writes each record to a JSONL file at once, and to wandb. It writes nothing until it is opened.

    What cannot be written, on a full disk, is kept and written before the next record.
    """

    def __init__(self, path: Path):
        self.path = path
        self.error: OSError | None = None  # why the file cannot be written, while that is so
        self._file: FileIO | None = None
        self._kept = b""  # what the file still lacks; the first line of it may be there in part
        self._wandb = WandbLog()

    def open(self, resume_step: int, wandb_run: str, wandb_mode: str, stage: str, settings: dict) -> None:
        """Drop the records from the resumed step on, which will be written again, but that of its save; start the wandb run if it
        has a name."""
        records = read_metrics(self.path)
        kept = [r for r in records if r["step"] < resume_step or (r["step"] == resume_step and "save_s" in r)]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = FileIO(self.path, "a")  # without a buffer, to know what is in the file
        self._wandb.open(wandb_run, wandb_mode, stage, settings)

    def write(self, record: dict) -> None:
        """Append a record, a dictionary with the key "step"."""
        if self._file is None:
            return
        self._kept += json.dumps(record).encode() + b"\n"
        if not self._write_kept():
            problem = f"cannot write {self.path}: {self.error}"
            warnings.warn(
                f"{problem}; training continues, and these records are written as soon as it can be", stacklevel=2
            )
        self._wandb.write(record)

    def _write_kept(self) -> bool:
        """Write what the file lacks; returns whether all of it could be written."""
        try:
            while self._kept:
                self._kept = self._kept[self._file.write(self._kept) :]
            self.error = None
        except OSError as error:
            self.error = error
        return self.error is None

    def close(self) -> None:
        self._wandb.close()
        if self._file is None:
            return
        if not self._write_kept():
            lost = self._kept.count(b"\n")
            warnings.warn(
                f"{self.path} lacks the last {lost} records, which could not be written: {self.error}", stacklevel=2
            )
        with contextlib.suppress(OSError):  # of a disk that reports only now what it could not write
            self._file.close()


def read_metrics(path: Path, *names: str) -> list[dict]:
    """The records of a metrics file that have a finite number for each of the names, and for "step". No file gives no records.

    A line that a kill has cut off, or of another shape, is left out.
    """
    if not path.exists():
        return []
    return [record for _, record in json_lines(path) if _has_numbers(record, ("step", *names))]


def _has_numbers(value: object, names: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and all(is_number(value.get(name)) for name in names)


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
