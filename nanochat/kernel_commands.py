"""The commands about kernels: what there is, what the compiler makes of it, the search for launch parameters, the gate."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

from nanochat.console import console, say
from nanochat.errors import UserError
from nanochat.gate import run_shape
from nanochat.gpt import GPTConfig
from nanochat.paths import Paths
from nanochat.preflight import most_rows
from nanochat.presets import PresetName, with_preset
from nanochat.runtime import start_runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train.base import BaseConfig
from nanochat_kernels import architecture, dispatch, gate, inspect, tune


@dataclass(frozen=True)
class KernelsListConfig:
    """List the fused operations, their implementations, and which of them impl=auto takes on this machine, and why."""


def list_kernels(config: KernelsListConfig) -> None:
    table = Table("operation", "implementations", "auto takes here", "because", box=None)
    for name, operation in sorted(dispatch.operations().items()):
        taken, why = dispatch.describe(operation)
        table.add_row(name, ", ".join((*operation.implementations, "reference")), taken, why)
    _show(table)


@dataclass(frozen=True)
class KernelsInspectConfig:
    """Compile every kernel with every committed configuration and flag set for an architecture; no GPU is needed.

    Fails on spilled registers, on more shared memory than a block can have, and on TMA or wgmma for sm80.
    """

    arch: Literal["sm80", "sm90"] = "sm80"
    """sm80: A100; sm90: H100 and H200"""
    kernel: tuple[str, ...] = ()
    """only these kernels, by their names in the launch tables"""


def inspect_kernels(config: KernelsInspectConfig) -> None:
    _check_names(config.kernel)
    try:
        found = list(inspect.inspect_all(config.arch, config.kernel))
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    table = Table(box=None)
    for name in ("kernel", "flags", "dtype", "shape", "constants"):
        table.add_column(name)
    for name in ("registers", "spilled B", "shared B"):
        table.add_column(name, justify="right")
    table.add_column("matrix and copy instructions")
    table.add_column("wrong")
    for one in found:
        constants = " ".join(f"{key}={int(value)}" for key, value in one.constants.items())
        numbers = (str(one.registers), str(one.spilled), str(one.shared))
        words = (one.kernel, one.flags, one.dtype, one.key, constants)
        table.add_row(*words, *numbers, _join(one.instructions), _join(one.faults))
    _show(table)
    faulty = [one for one in found if one.faults]
    if faulty:
        first = faulty[0]
        raise UserError(
            f"{len(faulty)} of {len(found)} launches for {config.arch} are faulty, the first {first.kernel} ({first.flags}) "
            f"{first.dtype} {first.key}: {_join(first.faults)}; change kernels/configs/{config.arch}.json, or tune again"
        )
    say(f"{len(found)} launches compile for {config.arch} without a fault")


def _check_names(names: tuple[str, ...]) -> None:
    known = [kernel.name for kernel in dispatch.tunable_kernels()]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(f"no kernel is called {', '.join(unknown)}; there are {', '.join(known)}")


@dataclass(frozen=True)
class KernelsTuneConfig:
    """Time every configuration of every kernel on the GPU here and write the fastest to its architecture's table."""

    kernel: tuple[str, ...] = ()
    """only these kernels, by the names that inspect prints"""
    arch: Literal["here", "sm80"] = "here"
    """sm80: tune the PTX that an A100 would get, on a newer GPU, as the next best thing to an A100"""


def tune_kernels(config: KernelsTuneConfig) -> None:
    try:
        if config.arch == "sm80":
            architecture.run_ptx_of("sm80")
        for what, milliseconds, parameters in tune.tune(config.kernel, say):
            say(f"{what}: {milliseconds:.4f} ms with {parameters}")
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error


@dataclass(frozen=True)
class KernelsGateConfig:
    """Validate and time every operation on the device that will train, at its shapes, and keep what training takes."""

    preset: PresetName = "d20"
    """whose depth, context and most rows of a stage; options given besides win"""
    depth: int = 0
    """blocks; 0: the preset's, as with the options below"""
    context_length: int = 0
    """tokens per row"""
    device_batch_size: int = 0
    """rows a process takes at once; training may take fewer"""
    n_kv_head: int = 0
    """key/value heads"""
    vocab_size: int = 0
    """tokens; 0: those of the trained tokenizer, else 65536"""
    device: str = "auto"
    """auto, cuda or cpu"""


def run_gate(config: KernelsGateConfig, paths: Paths) -> None:
    """Write gate.json under the base directory."""
    base = with_preset(BaseConfig(), "train base", config.preset)
    vocabulary = config.vocab_size or (
        Tokenizer.load(paths.tokenizer).vocab_size if paths.tokenizer.exists() else 65536
    )
    model = GPTConfig.from_depth(
        config.depth or base.depth, vocabulary, config.context_length or base.context_length,
        config.n_kv_head or base.n_kv_head,
    )  # fmt: skip
    with start_runtime(config.device) as runtime:
        shape = run_shape(model, config.device_batch_size or most_rows(config.preset))
        table = Table("operation", "training takes", "because", box=None)
        operations = {}
        for operation, choice in gate.examine(shape, runtime.device, runtime.compute_dtype):
            operations[operation] = choice
            table.add_row(operation, choice["impl"], choice["why"])
        gate.write(paths.gate, gate.identity(shape, runtime.device, runtime.compute_dtype), operations)
    _show(table)
    say(f"wrote {paths.gate}; training on this device and at these shapes takes it from now on")


def _join(words: Iterable[str]) -> str:
    return ", ".join(words) or "none"


def _show(table: Table) -> None:
    if not console.is_terminal:
        console.width = 200  # into a pipe or a file whole lines, not a terminal's width of 80
    console.print(table)
