"""Launch tables: the block sizes and numbers of warps of every kernel, one file for each architecture.

sm80.json (A100) and sm90.json (H100, H200) are written by `nanochat kernels tune` and contain
    launch: kernel → dtype → shape class → parameters; the name of a class is its key joined by "x": "2048x128", "65536xwhole"
    auto:   operation → {impl, why}: the implementation that impl="auto" takes on that architecture
    measured_on, versions, command: where the numbers come from; measured_elsewhere: kernel → GPU, for others than on that one
A device without a table of its own uses the table of the nearest architecture below it, or sm80.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import Any

import torch

from nanochat_kernels.architecture import architecture, without_device
from nanochat_kernels.operation import Key
from nanochat_kernels.tracing import constant_when_traced

FOLDER = Path(__file__).parent


_caches: list = []


def table_cache(function: Callable) -> Callable:
    """Cache a function's results as functools.lru_cache does, until `clear` is called. For values derived from the tables."""
    cached = lru_cache(maxsize=4096)(function)
    _caches.append(cached)
    return cached


Launches = Mapping[str, Mapping[str, Mapping[str, dict[str, int]]]]
"""kernel → dtype → shape class → parameters, as a table has them under its launch"""
_taken: Mapping[str, Launches] = {}
_lookups: ContextVar[Counter | None] = ContextVar("counted lookups", default=None)

plans: dict[tuple, Any] = {}
"""the cache of plan.cached_call; clearing it changes no result"""


class LaunchTableError(ValueError):
    """A launch table cannot be read, or lacks the requested entry."""


@table_cache
def table(architecture: str) -> dict[str, Any]:
    """Return the committed table with what take_parameters has put over it.

    Raises LaunchTableError, which names the file and what is wrong with it, if it cannot be read.
    """
    path = FOLDER / f"{architecture}.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LaunchTableError(f"{path}: {error}; write it with: nanochat kernels tune") from error
    if not isinstance(found, dict) or not {"auto", "launch"} <= found.keys():
        raise LaunchTableError(f"{path} must contain 'auto' and 'launch'; write it with: nanochat kernels tune")
    for kernel, dtypes in _taken.get(architecture, {}).items():
        for dtype, classes in dtypes.items():
            found["launch"].setdefault(kernel, {}).setdefault(dtype, {}).update(classes)
    return found


def take_parameters(taken: Mapping[str, Launches]) -> None:
    """From now on put these launch parameters, by architecture, over those of the committed tables, in place of any before."""
    global _taken
    if taken != _taken:
        _taken = taken
        clear()


@contextmanager
def counted_lookups() -> Iterator[Counter[tuple[str, torch.dtype, Key]]]:
    """Count the launch parameters that are looked up while the block runs, by kernel, dtype and the key of the call."""
    token = _lookups.set(Counter())
    try:
        yield _lookups.get()
    finally:
        _lookups.reset(token)


def launch_parameters(kernel: str, device: torch.device, dtype: torch.dtype, key: Key) -> dict[str, int]:
    """Return the parameters of the nearest shape class: words in the key must be equal, sizes are compared by their logarithms."""
    if not torch.compiler.is_compiling() and (lookups := _lookups.get()) is not None:
        lookups[kernel, dtype, key] += 1
    return dict(_nearest(kernel, device, dtype, key))


@table_cache
@constant_when_traced
def _nearest(kernel: str, device: torch.device, dtype: torch.dtype, key: Key) -> tuple[tuple[str, int], ...]:
    """Return launch_parameters as a tuple of pairs: a constant for torch.compile, which no caller can change."""
    name = architecture(device.index if device.type == "cuda" else None)
    return tuple(parameters_in(name, kernel, dtype, key).items())


def parameters_in(architecture: str, kernel: str, dtype: torch.dtype, key: Key) -> dict[str, int]:
    """Return launch_parameters from the table of a named architecture. Raises LaunchTableError if the table has no such entry."""
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
    """Return a key in the form that the tables use."""
    return "x".join(map(str, key))


def parse_key(text: str) -> Key:
    return tuple(int(part) if part.isdigit() else part for part in text.split("x"))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module, such as "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill at any instant, finds either the old content or the new one.

    nanochat has the same as write_atomically; the kernels must not import nanochat.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def tables_of(architecture: str) -> Iterator[None]:
    """Launch kernels on meta and CPU tensors with the parameters of this architecture while the block runs."""
    token = without_device.set(architecture)
    clear()
    try:
        yield
    finally:
        without_device.reset(token)
        clear()


def clear() -> None:
    """Clear everything cached from the tables, after one was written or the architecture changed."""
    for cached in (architecture, *_caches):
        cached.cache_clear()
    plans.clear()
