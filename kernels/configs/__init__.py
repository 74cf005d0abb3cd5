"""Launch tables: the block sizes and warps that each kernel is launched with, one file for each architecture.

sm80.json (A100) and sm90.json (H100, H200), written by `nanochat kernels tune`:
    launch: kernel → dtype → shape class → parameters; a class is its key joined by "x", as in "2048x128" or "1280xmasked"
    auto:   operation → {impl, why}: what impl="auto" takes on that architecture
    measured_on, versions, command: where the numbers come from
A device that has no table of its own takes the one of the nearest architecture below it, sm80 at least.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import Any

import torch

from nanochat_kernels.architecture import architecture, without_device
from nanochat_kernels.operation import Key

FOLDER = Path(__file__).parent


_caches: list = []


def remembered(function: Callable) -> Callable:
    """functools.lru_cache for what is derived from the tables: `clear` forgets it with them."""
    cached = lru_cache(maxsize=4096)(function)
    _caches.append(cached)
    return cached


plans: dict[tuple, Any] = {}
"""memory of plan.planned: what was derived from the tables for calls that are alike. Forgetting it changes no result."""


class LaunchTableError(ValueError):
    """A launch table cannot be read, or does not hold what was asked of it."""


@remembered
def table(architecture: str) -> dict[str, Any]:
    """The committed table. Raises LaunchTableError naming the file and what is wrong in it."""
    path = FOLDER / f"{architecture}.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LaunchTableError(f"{path}: {error}; write it with: nanochat kernels tune") from error
    if not isinstance(found, dict) or not {"auto", "launch"} <= found.keys():
        raise LaunchTableError(f"{path} must hold 'auto' and 'launch'; write it with: nanochat kernels tune")
    return found


def launch_parameters(kernel: str, device: torch.device, dtype: torch.dtype, key: Key) -> dict[str, int]:
    """The parameters of the nearest shape class: words of the key must be equal, sizes are compared by their logarithms."""
    return dict(_nearest(kernel, device, dtype, key))


@remembered
@torch.compiler.assume_constant_result
def _nearest(kernel: str, device: torch.device, dtype: torch.dtype, key: Key) -> tuple[tuple[str, int], ...]:
    """As pairs, which torch.compile takes as a constant and nobody can change in the cache."""
    name = architecture(device.index if device.type == "cuda" else None)
    return tuple(parameters_in(name, kernel, dtype, key).items())


def parameters_in(architecture: str, kernel: str, dtype: torch.dtype, key: Key) -> dict[str, int]:
    """launch_parameters from the table of a named architecture. Raises LaunchTableError for what the table does not hold."""
    try:
        classes = table(architecture)["launch"][kernel][dtype_name(dtype)]
    except KeyError as error:
        raise LaunchTableError(
            f"{FOLDER / architecture}.json has no {error} for {kernel} in {dtype}; write it with: nanochat kernels tune"
        ) from error
    fitting = [name for name in classes if _words(parse_key(name)) == _words(key) and len(parse_key(name)) == len(key)]
    if not fitting:
        raise LaunchTableError(
            f"{FOLDER / architecture}.json has no class like {format_key(key)} for {kernel} in {dtype}; "
            "write it with: nanochat kernels tune"
        )
    return classes[min(fitting, key=lambda name: (_distance(parse_key(name), key), name))]


def _words(key: Key) -> list[str]:
    return [part for part in key if isinstance(part, str)]


def _distance(known: Key, wanted: Key) -> float:
    pairs = [(a, b) for a, b in zip(known, wanted, strict=True) if not isinstance(a, str)]
    return sum(abs(log2(a) - log2(max(b, 1))) for a, b in pairs)


def format_key(key: Key) -> str:
    """A key as the tables write it."""
    return "x".join(map(str, key))


def parse_key(text: str) -> Key:
    return tuple(int(part) if part.isdigit() else part for part in text.split("x"))


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16 of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def tables_of(architecture: str) -> Iterator[None]:
    """Inside of the block, what is launched on tensors without a device takes the parameters of this architecture."""
    token = without_device.set(architecture)
    clear()
    try:
        yield
    finally:
        without_device.reset(token)
        clear()


def clear() -> None:
    """Forget what was read of the tables, after one was written or the architecture changed."""
    for cached in (architecture, *_caches):
        cached.cache_clear()
    plans.clear()
