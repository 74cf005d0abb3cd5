"""Every path nanochat reads or writes, all under the base directory: $NANOCHAT_BASE_DIR, else ~/.cache/nanochat.

What was fetched is in the base directory itself and shared by all runs. Everything else belongs to a run, in runs/<name>/.
"""

import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat.platform.environment import configured_base_directory, home_directory
from nanochat.platform.errors import UserError, remedy_for
from nanochat.platform.files import remove_leftovers

TRAINING_STAGES = ("base", "mid", "sft", "rl")  # the stages that write checkpoints, in order
DEFAULT_RUN = "default"  # the run of a command without a preset
PARTS_OF_A_RUN = ("tokenizer", "checkpoints", "metrics", "records", "report", "gate.json")


@dataclass(frozen=True)
class Paths:
    """The path of everything that a run reads or writes."""

    base: Path
    run_name: str = DEFAULT_RUN

    @property
    def run(self) -> Path:
        """The directory of the run: its tokenizer, checkpoints, report, and its embedded data if it has some."""
        return self.base / "runs" / self.run_name

    def of_run(self, name: str) -> "Paths":
        """The paths of another run.

        Raises UserError for a name that is no name of a directory, and when the base directory itself holds a run, as it did in
        earlier versions.
        """
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(f"--run-name {name!r} must begin with a letter or digit, and have only those and . _ + -")
        own_tokenizer = self.base / "tokenizer" / "tokenizer.json"
        if own_tokenizer.exists() or any(steps_in(self.base / "checkpoints" / stage) for stage in TRAINING_STAGES):
            parts = shlex.join(str(self.base / part) for part in PARTS_OF_A_RUN if (self.base / part).exists())
            target = f"{shlex.quote(f'{self.base}/runs')}/NAME"
            raise UserError(
                f"{self.base} holds a run of an earlier version, and runs now have directories of their own; move it to one with: "
                f"mkdir -p {target} && mv {parts} {target} (NAME is its preset, such as d20, or any "
                "name, which --run-name takes); its models can be evaluated and talked to, but their training does not go on"
            )
        return replace(self, run_name=name)

    @property
    def writable(self) -> bool:
        """Whether the directory of the run can be written to, or made."""
        existing = next(path for path in (self.run, *self.run.parents) if path.exists())
        return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)

    @property
    def runs(self) -> list[str]:
        """The names of all runs; the one that was worked on last comes last."""
        # a file that is replaced changes its directory; directories, unlike files, are not removed while this looks at them
        changed = {
            run.name: max(
                path.stat().st_mtime for path in (run, *run.glob("[!.]*"), *run.glob("[!.]*/*")) if path.is_dir()
            )
            for run in (self.base / "runs").glob("[!.]*")
            # one that has begun has locks before it has anything else
            if any((run / part).exists() for part in ("embedded", *PARTS_OF_A_RUN)) or any(run.glob("*.lock"))
        }
        return sorted(changed, key=lambda name: changed[name])

    @property
    def as_option(self) -> str:
        """The option that names the run in a command, for a message; empty for the default run."""
        return "" if self.run_name == DEFAULT_RUN else f" --run-name {self.run_name}"

    @property
    def other_runs(self) -> str:
        """The other runs that could be meant, for the end of a message; empty if there are none."""
        others = ", ".join(name for name in self.runs if name != self.run_name)
        return f"; this is about the run {self.run_name}, other runs: {others} (--run-name)" if others else ""

    @property
    def embedded(self) -> Path:
        """The data that nanochat generated for the run."""
        return self.run / "embedded"

    @property
    def data(self) -> Path:
        """Where the data are that the run reads: its embedded ones if it has some, else those that were fetched."""
        return self.embedded if self.reads_embedded else self.base

    @property
    def reads_embedded(self) -> bool:
        """Whether the run's data are the embedded ones, whose tests stand in for the benchmarks that they are named after."""
        return self.embedded.exists()

    @property
    def make_tokenizer(self) -> str:
        """The command that makes the run's tokenizer, for a message."""
        return f"nanochat tokenizer train{self.as_option}, with the --preset or --vocab-size of the run"

    @property
    def get_data(self) -> str:
        """What a user can do if the run has no data, for a message."""
        generate = f"nanochat data generate{self.as_option}"
        return f"generate the embedded data with: {generate}, or fetch the real data with: nanochat fetch"

    @property
    def text(self) -> Path:
        """Pretraining shards, shard_00000.parquet …; the last of the set is validation."""
        return self.data / "text"

    @property
    def chat_data(self) -> Path:
        """Chat sources, chat/<source>/<split>.parquet or .jsonl."""
        return self.data / "chat"

    @property
    def words(self) -> Path:
        """The word list of the spelling tasks, one word per line."""
        return self.data / "words.txt"

    @property
    def eval_bundle(self) -> Path:
        """core.yaml, eval_meta_data.csv and the tasks' JSONL files."""
        return self.data / "eval_bundle"

    @property
    def tokenizer(self) -> Path:
        return self.run / "tokenizer"

    @property
    def encodings(self) -> Path:
        """tiktoken's own files of gpt2 and cl100k_base, for comparison; optional."""
        return self.base / "encodings"

    @property
    def gate(self) -> Path:
        """The best implementation of each operation on the GPU that trains, as `nanochat kernels gate` measured it."""
        return self.run / "gate.json"

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
        return self.run / "stop"

    @property
    def starts(self) -> Path:
        """How often a job of a cluster has started the run since it last made progress."""
        return self.run / "starts.json"

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
        return self.run / "records"

    @property
    def report(self) -> Path:
        return self.run / "report"

    def lock(self, name: str) -> Path:
        """While this file exists, a command writes, and no other one of its kind can start (nanochat/platform/lock.py)."""
        return self.run / f"{name}.lock"

    def checkpoints(self, stage: str) -> Path:
        return self.run / "checkpoints" / stage

    def metrics(self, stage: str) -> Path:
        return self.run / "metrics" / f"{stage}.jsonl"

    def section(self, stage: str) -> Path:
        """The settings and results of a stage, for the report."""
        return self.report / "sections" / f"{stage}.json"


def steps_in(checkpoints: Path) -> dict[int, Path]:
    """The checkpoints in the directory of a stage, by their steps in ascending order; a copy under another name is none."""
    written = [path.parent for path in checkpoints.glob("step_*/meta.json")]
    numbers = {path: path.name.removeprefix("step_") for path in written}
    return dict(sorted((int(n), path) for path, n in numbers.items() if n.isdecimal() and n == f"{int(n):06d}"))


def base_paths(only_reads: bool = False) -> Paths:
    """The paths of the default run under the base directory, which is made if it does not exist, unless a command only reads.

    Raises UserError when neither NANOCHAT_BASE_DIR nor HOME is set, or when the directory cannot be written to but has to be.
    """
    home = home_directory()
    base = configured_base_directory() or (home and home / ".cache" / "nanochat")
    if base is None:
        raise UserError("neither NANOCHAT_BASE_DIR nor HOME is set; set NANOCHAT_BASE_DIR=/a/writable/directory")
    if only_reads:
        return Paths(base)
    try:
        base.mkdir(parents=True, exist_ok=True)
        probe = base / f".write-probe-{os.getpid()}"
        try:
            probe.write_bytes(b"probe")
        finally:
            probe.unlink(missing_ok=True)
        remove_leftovers(base, ".write-probe-*")
    except OSError as error:
        raise UserError(
            f"cannot write to the base directory {base} ({error.strerror or error}); "
            f"{remedy_for(error)}, or set NANOCHAT_BASE_DIR to a writable directory"
        ) from error
    return Paths(base)
