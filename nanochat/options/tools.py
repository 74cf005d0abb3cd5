"""The options of `nanochat trace` and `nanochat kernels list|inspect|tune|gate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from nanochat.options.model import LONGEST_CONTEXT
from nanochat.options.presets import NewestRun, PresetName, PresetOptions
from nanochat.options.ranges import AtLeast, Between


@dataclass(frozen=True)
class TraceOptions(NewestRun):
    """Show the result of every operation in a forward pass: of a small model after a few training steps, or of a trained one."""

    stage: Literal["none", "base", "mid", "sft", "rl"] = "none"
    """training stage whose newest model reads the prompt; none: a small model that reads random tokens"""
    prompt: str = ""
    """text that the stage's model reads"""

    depth: Annotated[int, Between(1, 1000)] = 2
    """blocks"""
    vocab_size: Annotated[int, Between(1, 1_000_000)] = 512
    """tokens in the vocabulary"""
    tokens: Annotated[int, Between(1, 10_000)] = 32
    """length of each row"""
    rows: Annotated[int, Between(1, 10_000)] = 4
    """rows of the batch"""
    steps: Annotated[int, AtLeast(0)] = 3
    """training steps before the pass that is shown; 0 shows the model as initialised"""
    markdown: Path | None = None
    """also write the table to this markdown file"""


@dataclass(frozen=True)
class KernelsListOptions:
    """List the fused operations, their implementations, and the one that impl=auto takes on this machine, with the reason."""


@dataclass(frozen=True)
class KernelsInspectOptions:
    """Compile every kernel for an architecture, with every committed configuration and flag set; needs no GPU.

    Fails for spilled registers, for more shared memory than a block can have, and for TMA or wgmma on sm80.
    """

    arch: Literal["sm80", "sm90"] = "sm80"
    """sm80: A100; sm90: H100 and H200"""
    kernel: tuple[str, ...] = ()
    """inspect only these kernels, by their names in the launch tables"""


@dataclass(frozen=True)
class KernelsTuneOptions:
    """Time every configuration of every kernel on this GPU and write the fastest to its architecture's table."""

    kernel: tuple[str, ...] = ()
    """tune only these kernels, by the names that inspect prints"""
    arch: Literal["auto", "sm80"] = "auto"
    """auto: this GPU's architecture; sm80: on a newer GPU, tune the PTX that an A100 would get, if no A100 is available"""


@dataclass(frozen=True)
class KernelsGateOptions(PresetOptions):
    """Validate and time every operation on the device and at the shapes of training, and write the choice to gate.json."""

    preset: PresetName | Literal[""] = ""
    """preset with the depth, the context and the largest micro-batch; without one, those of `train base`; others override it"""
    depth: Annotated[int, Between(0, 1000)] = 0
    """blocks; 0: the preset's number, as for the options below"""
    context_length: Annotated[int, Between(0, LONGEST_CONTEXT)] = 0
    """tokens per row"""
    device_batch_size: Annotated[int, Between(0, 1_000_000)] = 0
    """rows per micro-batch and process; training may use fewer. 0: the most that its stages take on this device"""
    n_kv_head: Annotated[int, Between(0, 1000)] = 0
    """key/value heads"""
    vocab_size: Annotated[int, Between(0, 1_000_000)] = 0
    """tokens in the vocabulary; 0: those of the trained tokenizer, else 65536"""
    tune: bool = True
    """on a GPU model that the launch table was not measured on, first search launch parameters for the kernels of this run"""
    device: str = "auto"
    """auto, cuda or cpu"""
