"""Saving and loading checkpoints, which stay whole when a process is killed at any instant.

checkpoints/<stage>/step_000123/ holds

    model.safetensors  the weights, in float32
    state/             optimizer shards and random states of every rank, a safetensors file of each, written by
                       torch.distributed.checkpoint, so that another number of ranks can load them
    meta.json          step, configuration, hash of the tokenizer, positions of the loaders, and size and hash of every other file

The directory is written under a temporary name, flushed to the disk, and renamed. All of it is JSON and safetensors, which cannot
run code when they are loaded.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.gate import without_rejected
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.options.model import Implementations
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError, remedy_for
from nanochat.platform.files import flush, fresh_directory, read_shape, sha256_of
from nanochat.platform.paths import TRAINING_STAGES, Paths, steps_in
from nanochat.platform.shapes import check_shape
from nanochat.tokenizer.bpe import Tokenizer

WEIGHTS = "model.safetensors"
SIZES = dict.fromkeys((field.name for field in fields(GPTConfig) if field.compare), int)
META = {"step": int, "config": SIZES, "tokenizer": str, "files": {str: object}}


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one training stage, of which the newest `keep` are kept."""

    directory: Path
    runtime: Runtime
    keep: int = 2

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in ascending order."""
        return list(steps_in(self.directory))

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:06d}"

    def sweep(self) -> None:
        """Remove what a killed save or removal left behind. Only the process that holds the stage's lock may call it."""
        for path in leftovers(self.directory):
            shutil.rmtree(path, ignore_errors=True)

    def save(self, step: int, model: GPT, optimizer: MuonAdamW, meta: dict) -> Path:
        """Write the checkpoint of a step; all ranks call it together. Raises UserError on all of them when one cannot write."""
        from nanochat.training_state import save_state, shard_files  # slow to import

        final, temporary = self.path(step), self.directory / f".step_{step:06d}.tmp"
        primary, contents = self.runtime.primary, []

        def begin() -> None:
            if primary:  # no rank may write before an earlier, incomplete attempt is removed
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)

        def write() -> None:
            save_state(temporary / "state", optimizer, self.runtime)
            files = [*(temporary / "state").glob(shard_files(self.runtime.rank))]
            if primary:
                weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
                save_file(weights, temporary / WEIGHTS)
                files.append(temporary / WEIGHTS)
            for path in files:
                # before the rename: after a loss of power, a renamed directory with empty files would look whole
                flush(path)
                content = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                contents.append((str(path.relative_to(temporary)), content))

        def finish() -> None:
            if not primary:
                return
            content = {"step": step, "config": model.config.to_dict(), **meta, "files": dict(chain(*everything))}
            (temporary / "meta.json").write_text(json.dumps(content, indent=1), "utf-8")
            for path in (temporary / "meta.json", temporary / "state", temporary):
                flush(path)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            flush(self.directory)  # the new name, before older checkpoints are deleted
            for old in self.steps()[: -self.keep]:
                _remove(self.path(old))

        everything: list = []
        for work in (begin, write, finish):
            failures = self._failures(work)
            everything = self.runtime.gather(contents)
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

    def check_model(self, config: GPTConfig) -> None:
        """Raise UserError if the newest checkpoint is of another model: before a model is made, which may take long."""
        if steps := self.steps():
            _require_same_model(self.path(steps[-1]), read_meta(self.path(steps[-1])), config)

    def newest_settings(self) -> dict:
        """The settings of the training that wrote the newest checkpoint, and `rows` of its micro-batches (None: an earlier version
        did not save them); nothing if there is no checkpoint."""
        if not (steps := self.steps()):
            return {}
        path = self.path(steps[-1])
        meta = read_meta(path)
        if "imported_from" in meta:
            raise UserError(
                f"{path} was imported, so that its training cannot be resumed; train the stage after it, or move {path} away"
            )
        try:
            check_shape({"rows": 1} | meta, {"settings": {str: object}, "rows": int}, str(path / "meta.json"))
        except UserError as error:
            raise damaged(path, str(error)) from error
        return meta["settings"] | {"rows": meta.get("rows")}

    def load(self, step: int, model: GPT, optimizer: MuonAdamW, tokenizer: Tokenizer) -> dict:
        """Load the weights and the training state of a step into model and optimizer; returns the content of meta.json.

        Raises UserError for a damaged checkpoint, another model or another tokenizer.
        """
        from nanochat.training_state import DamagedState, load_state  # slow to import

        path = self.path(step)
        meta = read_meta(path, tokenizer)
        # each rank reads a part of the files; all of them stop when one is damaged
        mine = sorted(meta["files"])[self.runtime.rank :: self.runtime.world_size]
        problems = [problem for problem in self.runtime.gather(_first_problem(path, meta, mine)) if problem]
        if problems:
            raise damaged(path, problems[0])
        _require_same_model(path, meta, model.config)
        load_weights(path, model)
        try:
            load_state(path / "state", optimizer, self.runtime)
        except DamagedState as error:
            raise damaged(path, str(error)) from error
        optimizer.steps = meta["step"]
        optimizer.refresh()  # load_weights has changed the weights, but not their copies in the compute dtype
        return meta


def leftovers(checkpoints: Path) -> list[Path]:
    """What killed saves and removals have left in the directory of a stage."""
    return [path for path in checkpoints.glob(".step_*") if path.suffix in (".tmp", ".old")]


def _require_same_model(path: Path, meta: dict, config: GPTConfig) -> None:
    different = {name: (value, meta["config"].get(name)) for name, value in config.to_dict().items()}
    different = ", ".join(f"{name} {a} (saved {b})" for name, (a, b) in different.items() if a != b)
    if different:
        raise UserError(
            f"{path} is of another model: {different}; use the saved values (or their --preset), or give the new model a run of its "
            "own: --run-name NAME"
        )


def damaged(path: Path, problem: str) -> UserError:
    """The error for a checkpoint that cannot be used, with the newest whole one before it."""
    for other in reversed(steps_in(path.parent).values()):
        if (len(other.name), other.name) >= (len(path.name), path.name):  # as numbers: the step after 999,999 is longer
            continue
        with suppress(UserError):
            if not _first_problem(other, meta := _read_complete(other), list(meta["files"])):
                return UserError(
                    f"{problem}; remove {path} and run the same command again: it then takes {other}, which is whole"
                )
    return UserError(f"{problem}; no whole checkpoint is before it: remove {path} and train this stage again")


def read_meta(path: Path, tokenizer: Tokenizer | None = None) -> dict:
    """The content of meta.json, after checking its shape, that every file has its size, and that the tokenizer is the checkpoint's.

    Raises UserError when one of them is not, which names an earlier whole checkpoint.
    """
    try:
        meta = _read_complete(path)
    except UserError as error:
        raise damaged(path, str(error)) from error
    if tokenizer is not None and meta["tokenizer"] != tokenizer.hash:
        raise UserError(
            f"{path} was trained with another tokenizer ({meta['tokenizer'][:12]}, now {tokenizer.hash[:12]}); "
            "restore that tokenizer, or train this stage again with another --run-name"
        )
    return meta


def _read_complete(path: Path) -> dict:
    """The content of meta.json. Raises UserError when it has another shape, or a file has not its size."""
    meta = read_shape(path / "meta.json", META)
    if unknown := meta["config"].keys() - SIZES:
        raise UserError(f"{path / 'meta.json'}['config'] has the unknown size {min(unknown)!r}")
    if path.name != f"step_{meta['step']:06d}":
        raise UserError(f"{path / 'meta.json'} is of step {meta['step']}")
    if WEIGHTS not in meta["files"] or any(Path(name).is_absolute() or ".." in name for name in meta["files"]):
        raise UserError(f"{path / 'meta.json'} does not list the files of a checkpoint")
    for name, content in meta["files"].items():
        if isinstance(content, dict):
            check_shape(content, {"bytes": int, "sha256": str}, f"{path / 'meta.json'}: {name}")
        size = content["bytes"] if isinstance(content, dict) else content
        actual = (path / name).stat().st_size if (path / name).exists() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            raise UserError(f"{path / name} {found}")
    try:
        needed = 4 * GPTConfig(**meta["config"]).num_parameters
    except UserError as error:
        raise UserError(f"{path / 'meta.json'}['config']: {error}") from error
    size = (path / WEIGHTS).stat().st_size
    if (
        needed > 4 * size
    ):  # so large a model must not even be allocated; load_weights names a few weights that are missing
        raise UserError(f"{path / 'meta.json'}['config'] is of a model of {needed:,} bytes, and {WEIGHTS} has {size:,}")
    return meta


def weights_hash(meta: dict) -> str | None:
    """The SHA-256 of a checkpoint's weights, from the content of its meta.json; None for one of an earlier version."""
    content = meta["files"][WEIGHTS]
    return content["sha256"] if isinstance(content, dict) else None


def _first_problem(path: Path, meta: dict, names: list[str]) -> str | None:
    """What is wrong with the content of one of these files, or None. Checkpoints of earlier versions have no hashes."""
    for name in names:
        content = meta["files"][name]
        if isinstance(content, dict):
            try:
                if sha256_of(path / name) != content["sha256"]:
                    return f"{path / name} is not what was saved (its SHA-256 differs)"
            except OSError as error:
                return f"{path / name} cannot be read ({error.strerror})"
    return None


def load_weights(path: Path, model: GPT) -> None:
    """Copy the weights of a checkpoint into its model. Raises UserError when names or shapes are others."""
    try:
        weights = load_file(path / WEIGHTS, device=str(model.device))
    except (SafetensorError, OSError) as error:
        raise damaged(path, f"{path / WEIGHTS} cannot be read ({error})") from error
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise damaged(
                path, f"{path / WEIGHTS}: {name} is {found.get(name, 'missing')}, wanted {wanted.get(name, 'nothing')}"
            )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def load_model(
    paths: Paths, stage: str, runtime: Runtime, impl: Implementations | None = None, step: int | None = None
) -> tuple[GPT, Tokenizer, dict]:
    """Load the model of a stage, without the state of its training; returns it with its tokenizer and the content of meta.json.

    impl: the implementations; what is left to "auto" does not take what the run's gate found wrong. step: the step of the
    checkpoint, by default the newest. Raises UserError, with the stages that have checkpoints, when there is none.
    """
    path, tokenizer, meta = find_checkpoint(paths, stage, runtime, step)
    config = GPTConfig(**meta["config"], impl=impl or Implementations())
    config = without_rejected(paths, config, runtime)
    return create_model(path, config, runtime, meta), tokenizer, meta


def find_checkpoint(
    paths: Paths, stage: str, runtime: Runtime, step: int | None = None
) -> tuple[Path, Tokenizer, dict]:
    """The directory of a stage's checkpoint, its tokenizer and the content of its meta.json; arguments and errors of `load_model`."""
    store = CheckpointStore(paths.checkpoints(stage), runtime)
    steps = store.steps()
    if not steps or (step is not None and step not in steps):
        trained = [name for name in TRAINING_STAGES if CheckpointStore(paths.checkpoints(name), runtime).steps()]
        wanted = f"step {step} of {stage}" if steps else stage
        remedy = (
            f"steps: {', '.join(map(str, steps))}"
            if steps
            else f"train it with: nanochat train {stage}{paths.as_option}"
        )
        raise UserError(
            f"no checkpoint of {wanted}; there are: {', '.join(trained) or 'none'}; {remedy}{paths.other_runs}"
        )
    path = store.path(steps[-1] if step is None else step)
    tokenizer = Tokenizer.load(paths.tokenizer, paths.make_tokenizer)
    return path, tokenizer, read_meta(path, tokenizer)


def create_model(path: Path, config: GPTConfig, runtime: Runtime, meta: dict) -> GPT:
    """A model with the weights of the checkpoint in `path`, whose meta.json has the content `meta`. Raises UserError for damage."""
    problem = _first_problem(path, meta, [WEIGHTS])
    if problem:
        raise damaged(path, problem)
    model = GPT.create(config, runtime.device, runtime.compute_dtype)
    load_weights(path, model)
    model.keep_copies()
    return model


def save_model(store: CheckpointStore, step: int, config: GPTConfig, weights: dict[str, Tensor], meta: dict) -> Path:
    """Write a checkpoint of weights alone, by their names in a GPT: training of its stage cannot resume from it."""
    with fresh_directory(store.path(step)) as directory:
        save_tensors(weights, directory / WEIGHTS)
        content = {"bytes": (directory / WEIGHTS).stat().st_size, "sha256": sha256_of(directory / WEIGHTS)}
        meta = {"step": step, "config": config.to_dict(), **meta, "files": {WEIGHTS: content}}
        (directory / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    return store.path(step)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file of safetensors; what the disk does not take is an OSError as for any other file."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise _as_os_error(error, path) from error


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill in between leaves nothing that looks like one."""
    old = path.with_name(f".{path.name}.old")
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _as_os_error(error: BaseException, path: Path | None = None) -> OSError:
    """The operating system's error in the chain of causes; an error of the disk with the same message if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return OSError(cause.errno, os.strerror(cause.errno))
        cause = cause.__cause__ or cause.__context__
    message = (str(error) or repr(error)).splitlines()[0]
    if "No space left" in str(error):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path) if path else None)
    return OSError(errno.EIO, message, str(path) if path else None)
