"""The options of `nanochat trace` and `nanochat kernels list|inspect|tune|gate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from nanochat.options.presets import PresetName
from nanochat.options.ranges import AtLeast


@dataclass(frozen=True)
class TraceOptions:
    """Run a few training steps of a small model and show the tensors of a forward pass after every operation."""

    depth: Annotated[int, AtLeast(1)] = 2
    """blocks"""
    vocab_size: Annotated[int, AtLeast(1)] = 512
    """tokens"""
    tokens: Annotated[int, AtLeast(1)] = 32
    """length of each row"""
    rows: Annotated[int, AtLeast(1)] = 4
    """rows of the batch"""
    steps: Annotated[int, AtLeast(0)] = 3
    """steps of training before the pass that is shown; 0 shows the model as initialised"""
    markdown: Path | None = None
    """also write the table to this file, as markdown"""


@dataclass(frozen=True)
class KernelsListOptions:
    """List the fused operations, their implementations, and which of them impl=auto takes on this machine, and why."""


@dataclass(frozen=True)
class KernelsInspectOptions:
    """Compile every kernel with every committed configuration and flag set for an architecture; no GPU is needed.

    Fails on spilled registers, on more shared memory than a block can have, and on TMA or wgmma for sm80.
    """

    arch: Literal["sm80", "sm90"] = "sm80"
    """sm80: A100; sm90: H100 and H200"""
    kernel: tuple[str, ...] = ()
    """only these kernels, by their names in the launch tables"""


@dataclass(frozen=True)
class KernelsTuneOptions:
    """Time every configuration of every kernel on the GPU here and write the fastest to its architecture's table."""

    kernel: tuple[str, ...] = ()
    """only these kernels, by the names that inspect prints"""
    arch: Literal["here", "sm80"] = "here"
    """sm80: tune the PTX that an A100 would get, on a newer GPU, as the next best thing to an A100"""


@dataclass(frozen=True)
class KernelsGateOptions:
    """Validate and time every operation on the device that will train, at its shapes, and keep what training takes."""

    preset: PresetName = "d20"
    """whose depth, context and most rows of a stage; options given besides win"""
    depth: Annotated[int, AtLeast(0)] = 0
    """blocks; 0: the preset's, as with the options below"""
    context_length: Annotated[int, AtLeast(0)] = 0
    """tokens per row"""
    device_batch_size: Annotated[int, AtLeast(0)] = 0
    """rows a process takes at once; training may take fewer"""
    n_kv_head: Annotated[int, AtLeast(0)] = 0
    """key/value heads"""
    vocab_size: Annotated[int, AtLeast(0)] = 0
    """tokens; 0: those of the trained tokenizer, else 65536"""
    device: str = "auto"
    """auto, cuda or cpu"""
