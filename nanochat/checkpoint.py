"""Saving and loading checkpoints, which stay whole when a process is killed at any instant.

checkpoints/<stage>/step_000123/ holds

    model.safetensors  the weights, in float32
    state/             optimizer shards and random states of every rank, written by torch.distributed.checkpoint, so that
                       another number of ranks can load them
    meta.json          step, configuration, hash of the tokenizer, positions of the loaders, and the size of every other file

The directory is written under a temporary name, flushed to the disk, and renamed.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.options.model import Implementations
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError, remedy_for
from nanochat.platform.files import flush
from nanochat.platform.paths import TRAINING_STAGES, Paths
from nanochat.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one training stage, of which the newest `keep` are kept."""

    directory: Path
    runtime: Runtime
    keep: int = 2

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in ascending order."""
        written = self.directory.glob("step_*/meta.json")
        return sorted(int(path.parent.name.removeprefix("step_")) for path in written)

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:06d}"

    def save(self, step: int, model: GPT, optimizer: MuonAdamW, meta: dict) -> Path:
        """Write the checkpoint of a step; all ranks call it together. Raises UserError on all of them when one cannot write."""
        from nanochat.training_state import save_state  # slow to import

        final, temporary = self.path(step), self.directory / f".step_{step:06d}.tmp"
        primary = self.runtime.primary

        def begin() -> None:
            if primary:  # no rank may write before an earlier, incomplete attempt is removed
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)

        def write() -> None:
            save_state(temporary / "state", optimizer, self.runtime)
            if primary:
                weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
                save_file(weights, temporary / "model.safetensors")
                files = [path for path in temporary.rglob("*") if path.is_file()]
                sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in sorted(files)}
                content = {"step": step, "config": model.config.to_dict(), **meta, "files": sizes}
                (temporary / "meta.json").write_text(json.dumps(content, indent=1), "utf-8")
                # before the rename: after a loss of power, a renamed directory with empty files would look whole
                for path in [*files, temporary / "meta.json", temporary / "state", temporary]:
                    flush(path)

        def finish() -> None:
            if primary:
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                flush(self.directory)  # the new name, before older checkpoints are deleted
                for old in self.steps()[: -self.keep]:
                    shutil.rmtree(self.path(old), ignore_errors=True)

        for work in (begin, write, finish):
            failures = self._failures(work)
            if failures:
                if primary:
                    shutil.rmtree(temporary, ignore_errors=True)
                steps = self.steps()
                last = f"the last whole checkpoint is {self.path(steps[-1])}" if steps else "there is none before it"
                raise UserError(
                    f"cannot save the checkpoint of step {step} in {self.directory} ({failures[0].strerror}); {last}; "
                    f"{remedy_for(failures[0])} and run the same command again"
                )
        return final

    def _failures(self, work: Callable[[], None]) -> list[OSError]:
        """Do this rank's part of the work; returns why it failed on any rank. A rank alone must not continue or stop."""
        failure = None
        try:
            work()
        except (OSError, SafetensorError) as error:
            failure = _as_os_error(error)
        return [failure for failure in self.runtime.gather(failure) if failure]

    def load(self, step: int, model: GPT, optimizer: MuonAdamW, tokenizer: Tokenizer) -> dict:
        """Load the weights and the training state of a step into model and optimizer; returns the content of meta.json.

        Raises UserError for a damaged checkpoint, another model or another tokenizer.
        """
        from nanochat.training_state import load_state  # slow to import

        path = self.path(step)
        meta = read_meta(path, tokenizer)
        if meta["config"] != model.config.to_dict():
            different = {k: (v, meta["config"].get(k)) for k, v in model.config.to_dict().items()}
            different = ", ".join(f"{k} {a} (saved {b})" for k, (a, b) in different.items() if a != b)
            raise UserError(
                f"{path} is of another model: {different}; use the saved values, or move {self.directory} away"
            )
        load_weights(path, model)
        load_state(path / "state", optimizer, self.runtime)
        optimizer.steps = meta["step"]
        optimizer.refresh()  # load_weights has changed the weights, but not their copies in the compute dtype
        return meta


def read_meta(path: Path, tokenizer: Tokenizer | None = None) -> dict:
    """The content of meta.json, after checking that every file has its size and that the tokenizer is the one of the checkpoint.

    Raises UserError when one of them is not.
    """
    try:
        meta = json.loads((path / "meta.json").read_text("utf-8"))
        sizes = meta["files"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is not a whole checkpoint ({error}); remove it and run the same command again"
        ) from error
    # sizes, not hashes: to hash a checkpoint of d20 would read 5.2 GB at every start
    for name, size in sizes.items():
        actual = (path / name).stat().st_size if (path / name).exists() else None
        if actual != size:
            problem = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            raise UserError(f"{path / name} {problem}; remove {path} and run the same command again")
    if tokenizer is not None and meta["tokenizer"] != tokenizer.hash:
        raise UserError(
            f"{path} was trained with another tokenizer ({meta['tokenizer'][:12]}, now {tokenizer.hash[:12]}); "
            "restore that tokenizer, or train this stage again in another NANOCHAT_BASE_DIR"
        )
    return meta


def load_weights(path: Path, model: GPT) -> None:
    """Copy the weights of a checkpoint into a model of the same shape. Raises UserError when they cannot be read."""
    try:
        weights = load_file(path / "model.safetensors", device=str(model.device))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path / 'model.safetensors'} is damaged ({error}); remove {path}") from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def load_model(
    paths: Paths, stage: str, runtime: Runtime, impl: Implementations | None = None, step: int | None = None
) -> tuple[GPT, Tokenizer, dict]:
    """Load the model of a stage, without the state of its training; returns it with its tokenizer and the content of meta.json.

    step: the step of the checkpoint, by default the newest. Raises UserError, with the stages that have checkpoints, when there
    is none.
    """
    path, tokenizer, meta = find_checkpoint(paths, stage, runtime, step)
    config = GPTConfig(**meta["config"], impl=impl or Implementations())
    return create_model(path, config, runtime), tokenizer, meta


def find_checkpoint(
    paths: Paths, stage: str, runtime: Runtime, step: int | None = None
) -> tuple[Path, Tokenizer, dict]:
    """The directory of a stage's checkpoint, its tokenizer and the content of its meta.json; arguments and errors of `load_model`."""
    store = CheckpointStore(paths.checkpoints(stage), runtime)
    steps = store.steps()
    if not steps or (step is not None and step not in steps):
        trained = [name for name in TRAINING_STAGES if CheckpointStore(paths.checkpoints(name), runtime).steps()]
        wanted = f"step {step} of {stage}" if steps else stage
        remedy = f"steps: {', '.join(map(str, steps))}" if steps else f"train it with: nanochat train {stage}"
        raise UserError(f"no checkpoint of {wanted}; there are: {', '.join(trained) or 'none'}; {remedy}")
    path = store.path(steps[-1] if step is None else step)
    tokenizer = Tokenizer.load(paths.tokenizer)
    return path, tokenizer, read_meta(path, tokenizer)


def create_model(path: Path, config: GPTConfig, runtime: Runtime) -> GPT:
    """A model with the weights of the checkpoint in `path`."""
    model = GPT.create(config, runtime.device, runtime.compute_dtype)
    load_weights(path, model)
    model.keep_copies()
    return model


def _as_os_error(error: BaseException) -> OSError:
    """The operating system's error in the chain of causes; an error of the disk with the same message if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return OSError(cause.errno, os.strerror(cause.errno))
        cause = cause.__cause__ or cause.__context__
    message = (str(error) or repr(error)).splitlines()[0]
    return OSError(errno.ENOSPC if "No space left" in str(error) else errno.EIO, message)
