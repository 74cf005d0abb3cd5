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
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

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
        final, temporary = self.path(step), self.directory / f".step_{step:06d}.tmp"
        failure = None
        if self.runtime.primary:
            shutil.rmtree(temporary, ignore_errors=True)
        self.runtime.barrier()
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of saving without a process group, which is meant
                dcp.save(
                    _training_state(optimizer, self.runtime),
                    checkpoint_id=temporary / "state",
                    no_dist=self.runtime.world_size == 1,
                )
            if self.runtime.primary:
                weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
                save_file(weights, temporary / "model.safetensors")
                files = [path for path in temporary.rglob("*") if path.is_file()]
                sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in sorted(files)}
                content = {"step": step, "config": model.config.to_dict(), **meta, "files": sizes}
                (temporary / "meta.json").write_text(json.dumps(content, indent=1), "utf-8")
                for path in [*files, temporary / "meta.json", temporary / "state", temporary]:
                    flush(path)
        except (OSError, SafetensorError, CheckpointException) as error:
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
        path = self.path(step)
        meta = read_meta(path, tokenizer)
        if meta["config"] != model.config.to_dict():
            different = {k: (v, meta["config"].get(k)) for k, v in model.config.to_dict().items()}
            different = ", ".join(f"{k} {a} (saved {b})" for k, (a, b) in different.items() if a != b)
            raise UserError(
                f"{path} is of another model: {different}; give the saved values, or move {self.directory} away"
            )
        load_weights(path, model)
        state = _training_state(optimizer, self.runtime)
        saved = dcp.FileSystemReader(path / "state").read_metadata().state_dict_metadata
        state = {name: tensor for name, tensor in state.items() if name in saved}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=path / "state", no_dist=self.runtime.world_size == 1)
        optimizer.steps = meta["step"]
        optimizer.refresh()
        if f"rng.cpu.{self.runtime.rank}" in state:
            torch.set_rng_state(state[f"rng.cpu.{self.runtime.rank}"])
        if f"rng.cuda.{self.runtime.rank}" in state:
            torch.cuda.set_rng_state(state[f"rng.cuda.{self.runtime.rank}"])
        return meta


def _training_state(optimizer: MuonAdamW, runtime: Runtime) -> dict[str, Tensor]:
    """Optimizer shards (as parts of whole tensors, so that another number of ranks can divide them differently) and random states."""
    state: dict[str, Tensor] = {}
    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,)) if runtime.world_size > 1 else None
    for name, share, items in optimizer.named_state():
        if mesh is not None and items is not None:
            shape = torch.Size((items, *share.shape[1:]))
            stride = torch.empty(shape, device="meta").stride()
            share = DTensor.from_local(share, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        state[f"optimizer.{name}"] = share
    state[f"rng.cpu.{runtime.rank}"] = torch.get_rng_state()
    if runtime.device.type == "cuda":
        state[f"rng.cuda.{runtime.rank}"] = torch.cuda.get_rng_state()
    return state


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
    inner = error
    if isinstance(error, CheckpointException) and error.failures:
        inner = next(iter(error.failures.values()))[0]
    seen: BaseException | None = inner
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return os.strerror(seen.errno)
        seen = seen.__cause__ or seen.__context__
    text = str(inner) or repr(inner)
    return os.strerror(errno.ENOSPC) if "No space left" in text else text.splitlines()[0]
