"""Saves and loads the part of a checkpoint besides the weights: optimizer state and the random states of every rank.

torch.distributed.checkpoint takes 1.3 s to import. Evaluation and chat do not need it, so that nanochat/checkpoint.py imports this
module only when it saves or loads such state.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from nanochat.optim import MuonAdamW
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError


class DamagedState(UserError):
    """State that cannot be loaded; the message says what is wrong with it."""


def shard_files(rank: int) -> str:
    """The pattern of the files that save_state writes on a rank."""
    return f"shard-{rank + 1:05d}-*.safetensors"


def save_state(folder: Path, optimizer: MuonAdamW, runtime: Runtime) -> None:
    """Write the state of all ranks to a new folder; all ranks call it together. Raises OSError when one of them cannot write."""
    try:
        with warnings.catch_warnings():
            # torch warns that there is no process group, which is intended for one process
            warnings.simplefilter("ignore")
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(_tensors(optimizer, runtime), storage_writer=writer, no_dist=runtime.world_size == 1)
    except CheckpointException as error:  # a BaseException, with the exceptions of the ranks
        first = next(iter(error.failures.values()))[0] if error.failures else error
        if isinstance(first, KeyboardInterrupt | torch.OutOfMemoryError):
            raise first from None
        raise OSError(str(first) or repr(first)) from first


def load_state(folder: Path, optimizer: MuonAdamW, runtime: Runtime) -> None:
    """Load this rank's part of the state into the optimizer and the random number generators.

    Raises DamagedState for state that is damaged or lacks a part of the optimizer, and UserError for that of an earlier version.
    """
    if (folder / ".metadata").exists():
        raise UserError(
            f"{folder} was written by an earlier version, in a format that can run code when it is loaded, and is not read; its "
            f"weights can still be evaluated and talked to. To train this stage again, move {folder.parent.parent} away"
        )
    wanted = _tensors(optimizer, runtime)
    try:
        reader = HuggingFaceStorageReader(str(folder))
        saved = reader.read_metadata().state_dict_metadata
        state = {name: tensor for name, tensor in wanted.items() if name in saved}  # a new rank has no random state
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, storage_reader=reader, no_dist=runtime.world_size == 1)
    except (CheckpointException, SafetensorError, OSError, ValueError, KeyError) as error:
        raise DamagedState(f"{folder} is damaged ({type(error).__name__})") from error
    missing = [name for name in wanted if name.startswith("optimizer.") and name not in saved]
    if missing:
        raise DamagedState(f"{folder} has no {missing[0]}; it is of another version of the program")
    if f"rng.cpu.{runtime.rank}" in state:
        torch.set_rng_state(state[f"rng.cpu.{runtime.rank}"])
    if f"rng.cuda.{runtime.rank}" in state:
        torch.cuda.set_rng_state(state[f"rng.cuda.{runtime.rank}"])


def _tensors(optimizer: MuonAdamW, runtime: Runtime) -> dict[str, Tensor]:
    """This rank's optimizer state and random states, by name.

    A shard of a tensor is a DTensor, a part of the whole, so that another number of ranks can divide it differently.
    """
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
