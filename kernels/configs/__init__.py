"""Launch tables: which block sizes and warps each kernel is launched with, one file an architecture.

sm80.json (A100) and sm90.json (H100, H200), written by `nanochat kernels tune`:
    launch: kernel → dtype → shape class → parameters
    auto:   operation → {impl, why}: what impl="auto" takes on that architecture
    measured_on, versions, command: where the numbers come from
A device that has no table of its own takes the one of the nearest architecture below it, sm80 at least.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
ARCHITECTURES = ("sm80", "sm90")
choices: dict[
    str, tuple[str, str]
] = {}  # operation → (implementation, why), where a gate chose; before the tables' "auto"


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel as `kernels tune` and `kernels inspect` see it."""

    name: str
    function: Any
    """what @triton.jit made"""
    sizes: tuple[int, ...]
    """shape classes that the tables hold"""
    dtypes: tuple[torch.dtype, ...]
    space: tuple[dict[str, int], ...]
    """launch parameters that tune tries"""
    arguments: Callable[[int, torch.dtype, dict[str, int]], tuple[dict[str, str], dict[str, Any]]]
    """(size, dtype, parameters) → (types of the arguments, values of the constants), to compile without a GPU"""
    example: Callable[[int, torch.dtype, torch.device], Callable[[dict[str, int]], Any]]
    """(size, dtype, device) → a launch of production size with the parameters given, to time"""


class LaunchTableError(ValueError):
    """A launch table is not one."""


@lru_cache
def table(architecture: str) -> dict[str, Any]:
    """The committed table. Raises LaunchTableError naming the file and what is wrong in it."""
    path = FOLDER / f"{architecture}.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LaunchTableError(f"{path}: {error}; write it anew with: nanochat kernels tune") from error
    if not isinstance(found, dict) or not {"auto", "launch"} <= found.keys():
        raise LaunchTableError(f"{path} must hold 'auto' and 'launch'; write it anew with: nanochat kernels tune")
    return found


@lru_cache
def architecture(device_index: int | None) -> str:
    """Whose table serves a CUDA device (None: no CUDA device, as under the interpreter)."""
    if device_index is None:
        return ARCHITECTURES[0]
    from kernels.inspect import forced_architecture  # set while sm_80 code is tried on a newer device

    major, _ = torch.cuda.get_device_capability(device_index)
    return forced_architecture() or ("sm90" if major >= 9 else "sm80")


def launch_parameters(kernel: str, device: torch.device, dtype: torch.dtype, size: int) -> dict[str, int]:
    """The parameters of the nearest shape class: `size` is what the kernel calls its size, such as a row's width."""
    return _nearest(kernel, architecture(device.index if device.type == "cuda" else None), dtype, size)


@lru_cache(maxsize=4096)
def _nearest(kernel: str, architecture: str, dtype: torch.dtype, size: int) -> dict[str, int]:
    try:
        classes = table(architecture)["launch"][kernel][str(dtype).removeprefix("torch.")]
    except KeyError as error:
        raise LaunchTableError(
            f"{FOLDER / architecture}.json has no {error} for {kernel} in {dtype}; write it with: nanochat kernels tune"
        ) from error
    nearest = min(classes, key=lambda known: (abs(log2(int(known)) - log2(max(size, 1))), int(known)))
    return classes[nearest]


def clear() -> None:
    """Forget what was read of the tables, after one was written or the architecture changed."""
    for cached in (table, architecture, _nearest):
        cached.cache_clear()
