"""Every path nanochat reads or writes, all under the base directory: $NANOCHAT_BASE_DIR, else ~/.cache/nanochat."""

import os
from dataclasses import dataclass
from pathlib import Path

from nanochat.platform.environment import configured_base_directory, home_directory
from nanochat.platform.errors import UserError, remedy_for

TRAINING_STAGES = ("base", "mid", "sft")  # the stages that write checkpoints, in order


@dataclass(frozen=True)
class Paths:
    """The path of everything that nanochat reads or writes."""

    base: Path

    @property
    def text(self) -> Path:
        """Pretraining shards, shard_00000.parquet …; the last of the set is validation."""
        return self.base / "text"

    @property
    def chat_data(self) -> Path:
        """Chat sources, chat/<source>/<split>.parquet or .jsonl."""
        return self.base / "chat"

    @property
    def words(self) -> Path:
        """The word list of the spelling tasks, one word per line."""
        return self.base / "words.txt"

    @property
    def eval_bundle(self) -> Path:
        """core.yaml, eval_meta_data.csv and the tasks' JSONL files."""
        return self.base / "eval_bundle"

    @property
    def tokenizer(self) -> Path:
        return self.base / "tokenizer"

    @property
    def encodings(self) -> Path:
        """tiktoken's own files of gpt2 and cl100k_base, for comparison; optional."""
        return self.base / "encodings"

    @property
    def gate(self) -> Path:
        """The best implementation of each operation on the GPU that trains, as `nanochat kernels gate` measured it."""
        return self.base / "gate.json"

    @property
    def assets(self) -> Path:
        """The files that were fetched, with sizes and hashes."""
        return self.base / "assets.json"

    @property
    def hashes(self) -> Path:
        """Hashes of the training data, with size and time of change of each file, so that it is read only once."""
        return self.base / "hashes.json"

    @property
    def chat_history(self) -> Path:
        """What was typed in chats."""
        return self.base / "chat_history.txt"

    @property
    def stop(self) -> Path:
        """While this file exists, training saves and ends after its step. The speedrun makes it on a signal, for all nodes."""
        return self.base / "stop"

    @property
    def logs(self) -> Path:
        """The output of the jobs of a cluster."""
        return self.base / "logs"

    @property
    def jobs(self) -> Path:
        """The jobs that were submitted, one line of JSON each."""
        return self.base / "jobs.jsonl"

    @property
    def records(self) -> Path:
        """Completion records of the stages."""
        return self.base / "records"

    @property
    def report(self) -> Path:
        return self.base / "report"

    def checkpoints(self, stage: str) -> Path:
        return self.base / "checkpoints" / stage

    def metrics(self, stage: str) -> Path:
        return self.base / "metrics" / f"{stage}.jsonl"

    def section(self, stage: str) -> Path:
        """The settings and results of a stage, for the report."""
        return self.report / "sections" / f"{stage}.json"


def base_paths() -> Paths:
    """The paths under the base directory, which is made if it does not exist.

    Raises UserError when neither NANOCHAT_BASE_DIR nor HOME is set, or when the directory cannot be written to.
    """
    home = home_directory()
    base = configured_base_directory() or (home and home / ".cache" / "nanochat")
    if base is None:
        raise UserError("neither NANOCHAT_BASE_DIR nor HOME is set; set NANOCHAT_BASE_DIR=/a/writable/directory")
    try:
        base.mkdir(parents=True, exist_ok=True)
        probe = base / f".write-probe-{os.getpid()}"
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the base directory {base} ({error.strerror or error}); "
            f"{remedy_for(error)}, or set NANOCHAT_BASE_DIR to a writable directory"
        ) from error
    return Paths(base)
