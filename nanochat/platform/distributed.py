"""Where a command runs: device, dtype, rank among processes. One process by itself, or many started by torchrun."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.platform.environment import collective_timeout
from nanochat.platform.errors import UserError

# dense bf16 FLOP/s by the vendors' datasheets, by a part of the device's name; the first that fits counts
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}

# what gloo and NCCL say when a process does not answer
LOST = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe", "connection refused", "peer")


@dataclass(frozen=True)
class Runtime:
    """rank of world_size processes, on a device, computing in a dtype."""

    rank: int
    world_size: int
    device: torch.device
    compute_dtype: torch.dtype
    control: dist.ProcessGroup | None = None  # of messages that never wait for a GPU; None: torch's own

    @property
    def primary(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def peak_flops(self) -> float | None:
        """Of this process's device, None when not known."""
        name = self.device_name
        return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(self.control)

    def sum(self, values: list[float]) -> list[float]:
        """Sums over ranks of a few numbers, without touching the device."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def gather(self, value: object) -> list:
        """One small object from every rank, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def read(self, tensor: Tensor) -> list[float]:
        """The numbers of a tensor that may wait on the device for other ranks. Raises TimeoutError when one does not come."""
        if self.world_size > 1 and self.device.type == "cuda":  # a copy alone would wait for ever
            tensor = tensor.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            deadline = time.monotonic() + collective_timeout().total_seconds()
            while not arrived.query():
                if time.monotonic() > deadline:
                    raise TimeoutError("NCCL timed out")
                time.sleep(1e-4)
        return tensor.tolist()


@contextmanager
def start_runtime(device: str = "auto") -> Iterator[Runtime]:
    """The runtime of this process; joins the others when torchrun started it.

    device: auto (cuda, else cpu), cuda, cpu or mps. Raises UserError when it is not there.
    """
    kind = pick_device(device)
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to repeat bit for bit
    if not dist.is_torchelastic_launched():
        yield Runtime(0, 1, torch.device(kind), compute_dtype(kind))
        return
    if kind == "mps":
        raise UserError("mps serves one process only; start nanochat without torchrun")
    local = dist.get_node_local_rank(fallback_rank=0)
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this node has no GPU ({torch.cuda.device_count()} there); start fewer")
        torch.cuda.set_device(local)
    index = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    timeout, control = collective_timeout(), None
    if kind == "cuda":
        # NCCL's own watchdog aborts the process without a word that helps: it comes last
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=1.5 * timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield Runtime(dist.get_rank(), dist.get_world_size(), index, compute_dtype(kind), control)
    except (RuntimeError, TimeoutError) as error:  # torch.distributed's are RuntimeErrors
        if not any(words in str(error).lower() for words in LOST):
            raise
        raise UserError(
            f"process {dist.get_rank()} of {dist.get_world_size()} lost another one: it died, or hangs for more than "
            f"{timeout.total_seconds():.0f} s ({str(error).splitlines()[0]}); see the other processes' last lines; the same "
            "command goes on from the last checkpoint"
        ) from error
    finally:
        # waiting for the others after an error would hang until the timeout: they may never arrive
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def pick_device(device: str) -> str:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there.get(device):
        raise UserError(
            f"device {device!r} is not there; choose one of auto, {', '.join(d for d in there if there[d])}"
        )
    return device


def compute_dtype(kind: str) -> torch.dtype:
    """bf16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if kind == "cuda" else torch.float32
