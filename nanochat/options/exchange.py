"""The options of `nanochat export` and `nanochat import`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanochat.options.presets import NamedRun, NewestRun
from nanochat.options.ranges import AtLeast, OrNegative


@dataclass(frozen=True)
class ExportOptions(NewestRun):
    """Write a model for other programs: weights, configuration, tokenizer and chat template."""

    format: Literal["hf"] = "hf"
    """hf: a directory that the transformers library loads, as its NanoChat architecture"""
    stage: Literal["base", "mid", "sft", "rl"] = "sft"
    """training stage whose checkpoint is exported"""
    step: Annotated[int, OrNegative(meaning="the newest")] = -1
    """step of the checkpoint"""
    output: Path | None = None
    """directory to write; by default runs/<name>/export/<stage> in the base directory"""


@dataclass(frozen=True)
class ImportOptions(NamedRun):
    """Read a NanoChat model of the transformers library, such as `nanochat export` writes, into a run without a model."""

    source: Annotated[Path, tyro.conf.Positional] = Path()
    """directory with config.json, model.safetensors and tokenizer.json"""
    stage: Literal["base", "mid", "sft", "rl"] = "sft"
    """training stage that the model becomes: base can be trained on by mid, mid by sft, sft by rl"""
    step: Annotated[int, AtLeast(0)] = 0
    """number that its checkpoint gets"""
