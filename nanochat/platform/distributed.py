"""The device, the dtype and the rank of a process, which runs alone or is one of many that torchrun has started."""

import gc
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.platform.environment import collective_timeout, kernel_library
from nanochat.platform.errors import UserError
from nanochat.platform.signals import end_with_parent

# dense bf16 FLOP/s from the vendors' datasheets, by a part of the device's name; the first match counts
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

# what gloo and NCCL say when another process died or does not answer; gloo puts the file of its source in front
LOST_PROCESS = re.compile(
    r"gloo/transport/\S+\].*(closed by peer|reset by peer|broken pipe|refused|timeout|timed out)"
    r"|application timeout caused pair closure"
    r"|connection closed by peer \["
    r"|timed out waiting \d+ms for \w+ operation to complete"
    r"|remote process exited or there was a network error|ncclRemoteError"
    r"|socketProgress: connection closed by remote peer"
    r"|(nccl|collective operation).*(timed out|timeout)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Runtime:
    """A process: its rank among world_size processes, its device, and the dtype that it computes in."""

    rank: int
    world_size: int
    device: torch.device
    compute_dtype: torch.dtype
    # for exchanges between hosts, which do not wait for a GPU; None: torch's default
    control: dist.ProcessGroup | None = None

    @property
    def primary(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s of this process's device, or None when they are not known."""
        name = self.device_name
        return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)

    @property
    def memory(self) -> int | None:
        """Bytes of memory of this process's GPU, or None without CUDA."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None

    def barrier(self) -> None:
        """Wait until every rank has called it."""
        if self.world_size > 1:
            dist.barrier(self.control)

    def sum(self, values: list[float]) -> list[float]:
        """The sum over ranks of each of a few numbers, without using the device."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def gather(self, value: object) -> list:
        """The objects of all ranks, in order of rank, on every rank; for small objects."""
        if self.world_size == 1:
            return [value]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def read(self, tensor: Tensor) -> list[float]:
        """The numbers of a tensor whose computation may wait for other ranks. Raises TimeoutError when one does not answer."""
        if self.world_size > 1 and self.device.type == "cuda":  # a plain copy would wait for ever
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
    """Give the block the runtime of this process, which joins the others if torchrun has started it.

    device: auto (cuda, else cpu), cuda, cpu or mps. Raises UserError when the device is not available, and when the block fails
    because another process is lost.
    """
    kind = pick_device(device)
    if kind == "cuda":
        use_kernel_library(kernel_library())
        torch.set_float32_matmul_precision("high")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to repeat results bit for bit
    if not dist.is_torchelastic_launched():
        yield Runtime(0, 1, torch.device(kind), compute_dtype(kind))
        return
    if kind == "mps":
        raise UserError("mps serves one process only; start nanochat without torchrun")
    end_with_parent(os.getppid())
    local = dist.get_node_local_rank(fallback_rank=0)
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this node has no GPU (there are {torch.cuda.device_count()}); start fewer"
            )
        torch.cuda.set_device(local)
    index = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    # before the group exists: the default arguments of these functions would keep it, and with it gloo's threads, after it is
    # destroyed; torch.compile and torch.distributed.checkpoint import the module later
    from torch.distributed.nn import functional  # noqa: F401

    timeout, control = collective_timeout(), None
    if kind == "cuda":
        # 1.5: NCCL's own watchdog aborts the process without a helpful message, so it must come after our timeout
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=1.5 * timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield Runtime(dist.get_rank(), dist.get_world_size(), index, compute_dtype(kind), control)
    except (RuntimeError, TimeoutError) as error:  # torch.distributed's are RuntimeErrors
        if not lost_another_process(error):
            raise
        raise UserError(
            f"process {dist.get_rank()} of {dist.get_world_size()} lost another one, which died or did not answer for "
            f"{timeout.total_seconds():.0f} s ({str(error).splitlines()[0]}); see the last lines of the other processes; the "
            "same command resumes from the last checkpoint"
        ) from error
    finally:
        # waiting for the others after an error would hang until the timeout: they may never arrive
        if sys.exc_info()[0] is None:
            gc.collect()  # NCCL waits until no CUDA graph that was captured with it exists, also for one in a cycle of references
            dist.destroy_process_group()


def use_kernel_library(path: Path | None) -> None:
    """Let kernels come from the library that was built ahead of time. Raises UserError if it cannot be loaded."""
    if path is None:
        return
    from nanochat_kernels import library  # which imports Triton

    try:
        library.use(path)
    except library.LibraryError as error:
        raise UserError(f"NANOCHAT_AOT={path}: {error}") from error


def lost_another_process(error: BaseException) -> bool:
    """Whether an error says that another process died or does not answer, and not something about this one."""
    return isinstance(error, dist.DistNetworkError) or bool(LOST_PROCESS.search(str(error)))


def pick_device(device: str) -> str:
    """The kind of device that an option names: cuda, cpu or mps. Raises UserError when it is not available."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available.get(device):
        choices = ", ".join(name for name in available if available[name])
        raise UserError(f"device {device!r} is not available; choose one of auto, {choices}")
    return device


def compute_dtype(kind: str) -> torch.dtype:
    """The dtype of computation on a kind of device: bf16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if kind == "cuda" else torch.float32
