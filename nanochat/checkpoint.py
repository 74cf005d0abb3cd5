"""Checkpoints that a kill at any instant cannot spoil.

checkpoints/<stage>/step_000123/ holds model.safetensors (float32 weights), state/ (optimizer shards and random states of
every rank, by torch.distributed.checkpoint, loadable on another number of ranks) and meta.json (step, configuration,
tokenizer hash, loader positions, and the size of every other file). The directory is written under a temporary name,
flushed, and renamed.
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
from nanochat.platform.errors import UserError
from nanochat.platform.files import flush
from nanochat.platform.paths import TRAINING_STAGES, Paths
from nanochat.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one stage; the newest `keep` stay."""

    directory: Path
    runtime: Runtime
    keep: int = 2

    def steps(self) -> list[int]:
        found = self.directory.glob("step_*/meta.json")
        return sorted(int(path.parent.name.removeprefix("step_")) for path in found)

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:06d}"

    def save(self, step: int, model: GPT, optimizer: MuonAdamW, meta: dict) -> Path:
        """Write the checkpoint of a step on all ranks together. Raises UserError, on all of them, when it cannot."""
        from nanochat.training_state import save_state  # slow to import

        final, temporary = self.path(step), self.directory / f".step_{step:06d}.tmp"
        failure = None
        if self.runtime.primary:
            shutil.rmtree(temporary, ignore_errors=True)
        self.runtime.barrier()
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            save_state(temporary / "state", optimizer, self.runtime)
            if self.runtime.primary:
                weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
                save_file(weights, temporary / "model.safetensors")
                files = [path for path in temporary.rglob("*") if path.is_file()]
                sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in sorted(files)}
                content = {"step": step, "config": model.config.to_dict(), **meta, "files": sizes}
                (temporary / "meta.json").write_text(json.dumps(content, indent=1), "utf-8")
                for path in [*files, temporary / "meta.json", temporary / "state", temporary]:
                    flush(path)
        except (OSError, SafetensorError) as error:
            failure = _reason(error)
        failures = [reason for reason in self.runtime.gather(failure) if reason]
        if failures:
            if self.runtime.primary:
                shutil.rmtree(temporary, ignore_errors=True)
            kept = self.steps()
            last = f"the last whole checkpoint is {self.path(kept[-1])}" if kept else "there is none before it"
            raise UserError(
                f"cannot save the checkpoint of step {step} in {self.directory} ({failures[0]}); {last}; "
                "free space and run the same command again"
            )
        if self.runtime.primary:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            flush(self.directory)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old), ignore_errors=True)
        self.runtime.barrier()
        return final

    def load(self, step: int, model: GPT, optimizer: MuonAdamW, tokenizer: Tokenizer) -> dict:
        """Put a checkpoint's weights and training state into model and optimizer; returns its meta data."""
        from nanochat.training_state import load_state  # slow to import

        path = self.path(step)
        meta = read_meta(path, tokenizer)
        if meta["config"] != model.config.to_dict():
            different = {k: (v, meta["config"].get(k)) for k, v in model.config.to_dict().items()}
            different = ", ".join(f"{k} {a} (saved {b})" for k, (a, b) in different.items() if a != b)
            raise UserError(
                f"{path} is of another model: {different}; give the saved values, or move {self.directory} away"
            )
        load_weights(path, model)
        load_state(path / "state", optimizer, self.runtime)
        optimizer.steps = meta["step"]
        optimizer.refresh()
        return meta


def read_meta(path: Path, tokenizer: Tokenizer | None = None) -> dict:
    """meta.json of a checkpoint, after checking that every file is whole and that the tokenizer is the one it had."""
    try:
        meta = json.loads((path / "meta.json").read_text("utf-8"))
        sizes = meta["files"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no whole checkpoint ({error}); remove it and run the same command again") from error
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes, not {size}"
            raise UserError(f"{path / name} is {state}; remove {path} and run the same command again")
    if tokenizer is not None and meta["tokenizer"] != tokenizer.hash:
        raise UserError(
            f"{path} was trained with another tokenizer ({meta['tokenizer'][:12]}, now {tokenizer.hash[:12]}); "
            "restore that tokenizer, or train this stage again in another NANOCHAT_BASE_DIR"
        )
    return meta


def load_weights(path: Path, model: GPT) -> None:
    """Copy model.safetensors into a model of the same shape."""
    try:
        weights = load_file(path / "model.safetensors", device=str(model.device))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path / 'model.safetensors'} is damaged ({error}); remove {path}") from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def load_model(
    paths: Paths,
    stage: str,
    runtime: Runtime,
    impl: Implementations | None = None,
    step: int | None = None,
    adapt: Callable[[GPTConfig], GPTConfig] = lambda config: config,
) -> tuple[GPT, Tokenizer, dict]:
    """The newest (or a given) checkpoint of a stage with its tokenizer. Raises UserError naming the stages there are.

    adapt: changes the configuration before the model is made of it, as the gate does with its implementations.
    """
    store = CheckpointStore(paths.checkpoints(stage), runtime)
    steps = store.steps()
    if not steps or (step is not None and step not in steps):
        there = [name for name in TRAINING_STAGES if CheckpointStore(paths.checkpoints(name), runtime).steps()]
        wanted = f"step {step} of {stage}" if steps else stage
        remedy = f"steps: {', '.join(map(str, steps))}" if steps else f"train it with: nanochat train {stage}"
        raise UserError(f"no checkpoint of {wanted}; there are: {', '.join(there) or 'none'}; {remedy}")
    path = store.path(steps[-1] if step is None else step)
    tokenizer = Tokenizer.load(paths.tokenizer)
    meta = read_meta(path, tokenizer)
    config = adapt(GPTConfig(**meta["config"], impl=impl or Implementations()))
    model = GPT.create(config, runtime.device, runtime.compute_dtype)
    load_weights(path, model)
    model.keep_copies()
    return model, tokenizer, meta


def _reason(error: BaseException) -> str:
    """The first line that says what went wrong: of the operating system's error inside, when there is one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return os.strerror(seen.errno)
        seen = seen.__cause__ or seen.__context__
    text = str(error) or repr(error)
    return os.strerror(errno.ENOSPC) if "No space left" in text else text.splitlines()[0]
