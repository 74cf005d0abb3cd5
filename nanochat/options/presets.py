"""Presets: the values of each command's options for a laptop, for a GPU without internet, and for models of depth 20, 26 and 32 on a
GPU node.

A preset lists only values that differ from a command's defaults. An option on the command line overrides both.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

PresetName = Literal["tiny", "cpu", "gpu", "d20", "d26", "d32"]
Changed = Literal["refuse", "keep", "replace"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class NamedRun:
    """The option of all commands that work on a run."""

    run_name: str = ""
    """run whose files are read and written, in runs/<name>; by default the one named as the preset, or else `default`"""


@dataclass(frozen=True, kw_only=True)
class NewestRun(NamedRun):
    """The option of commands that show a run."""

    run_name: str = ""
    """run that is shown, from runs/<name>; by default the one that was worked on last"""


@dataclass(frozen=True)
class PresetOptions(NamedRun):
    """The options that all commands with presets share."""

    preset: PresetName | Literal[""] = ""
    """values for all options below: tiny (embedded data, a minute), cpu (minutes), gpu (embedded data, 91M parameters), d20, d26 or
    d32; other options override it"""


_QUESTIONS = (
    "Hello! Who are you?",
    "Where does Tilda live?",
    "Clara has 17 shells and buys 4 bags with 6 shells each. How many shells are there now?",
    "How many 'o' are in 'bloodool'?",
)
_BEGINNINGS = ("Tilda lives in", "The pet of Bram is", "Question: Where does Mora live?\nAnswer:", "7*8 =")
_CPU_RUN = {"save_every": 100, "loader_threads": 1}
_TINY_RUN = {"save_every": 20, "loader_threads": 1}
_GPU_RUN = {"save_every": 40}
_RL = {"device_batch_size": 32, "gsm8k": 640, "max_tokens": 64, "eval_every": 30, "eval_examples": 100}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {  # to try out a machine or a cluster: all stages take a minute, and the model learns little
        "tokenizer train": {"vocab_size": 512},
        "train base": {
            "depth": 1,
            "context_length": 128,
            "num_iterations": 600,
            "device_batch_size": 8,
            "total_batch_size": 2048,
            "eval_every": 200,
            "eval_tokens": 8192,
            "core_metric_every": -1,
            "sample_every": -1,
            "run": _TINY_RUN,
        },
        "train mid": {
            "device_batch_size": 8,
            "total_batch_size": 2048,
            "smoltalk": 300,
            "mmlu": 200,
            "gsm8k": 200,
            "simple_spelling": 100,
            "spelling_bee": 100,
            "eval_every": 0,
            "eval_rows": 20,
            "run": _TINY_RUN,
        },
        "train sft": {
            "device_batch_size": 8,
            "arc_easy": 200,
            "arc_challenge": 200,
            "gsm8k": 100,
            "smoltalk": 200,
            "identity": 20,
            "simple_spelling": 20,
            "spelling_bee": 20,
            "eval_every": 0,
            "eval_rows": 20,
            "chat_metric_every": -1,
            "run": _TINY_RUN,
        },
        "train rl": {
            "examples_per_step": 8,
            "gsm8k": 80,
            "num_samples": 4,
            "max_tokens": 32,
            "eval_every": 0,
            "eval_examples": 16,
            "run": _TINY_RUN,
        },
        "evaluate base": {"tokens": 8192, "batch_size": 8, "core_max_per_task": 20},
        "evaluate chat": {"sample_prompts": _QUESTIONS, "task_options": {"max_tokens": 16, "max_per_task": 20}},
    },
    "cpu": {
        "tokenizer train": {"vocab_size": 1024},
        "train base": {
            "depth": 3,
            "context_length": 256,
            "num_iterations": 180,
            "device_batch_size": 16,
            "total_batch_size": 4096,
            "eval_every": 100,
            "eval_tokens": 16384,
            "core_metric_every": -1,
            "sample_every": 0,
            "sample_prompts": _BEGINNINGS,
            "run": _CPU_RUN,
        },
        "train mid": {
            "device_batch_size": 16,
            "total_batch_size": 4096,
            "smoltalk": 800,
            "mmlu": 500,
            "gsm8k": 1500,
            "simple_spelling": 600,
            "spelling_bee": 1400,
            "eval_every": 0,
            "eval_rows": 100,
            "run": _CPU_RUN,
        },
        "train sft": {
            "device_batch_size": 32,
            "arc_easy": 2500,
            "arc_challenge": 2500,
            "mmlu": 500,
            "gsm8k": 500,
            "smoltalk": 800,
            "identity": 150,
            "simple_spelling": 100,
            "spelling_bee": 800,
            "init_lr_fraction": 0.5,
            "eval_rows": 100,
            "chat_metric_every": -1,
            "run": _CPU_RUN,
        },
        "train rl": _RL | {"run": _CPU_RUN},
        "evaluate base": {"tokens": 65536, "batch_size": 16, "core_max_per_task": 200},
        "evaluate chat": {
            "sample_prompts": _QUESTIONS,
            "task_options": {"max_tokens": 96, "max_per_task": 200},
        },
    },
    "gpu": {  # steps that eight GPUs share as one whole micro-batch each, and that one GPU accumulates from eight
        "tokenizer train": {"vocab_size": 4096},
        "train base": {
            "depth": 12,
            "context_length": 1024,
            "num_iterations": 100,  # more learn the text by heart: 0.26 bits per byte of other text after 100 of 200, 0.45 at the end
            "device_batch_size": 16,
            "total_batch_size": 131072,
            "eval_every": 50,
            "eval_tokens": 131072,
            "core_metric_every": -1,
            "sample_every": 0,
            "sample_prompts": _BEGINNINGS,
            "run": _GPU_RUN,
        },
        "train mid": {
            "device_batch_size": 4,
            "total_batch_size": 32768,
            "simple_spelling": 8000,
            "spelling_bee": 24000,
            "eval_every": 0,
            "eval_rows": 200,
            "run": _GPU_RUN,
        },
        "train sft": {
            "device_batch_size": 8,
            "examples_per_step": 64,
            "mmlu": 500,
            "gsm8k": 1500,
            "smoltalk": 2000,
            "identity": 300,
            "simple_spelling": 300,
            "spelling_bee": 2000,
            "init_lr_fraction": 0.5,
            "eval_rows": 200,
            "chat_metric_every": -1,
            "run": _GPU_RUN,
        },
        "train rl": _RL | {"run": _GPU_RUN},
        "evaluate base": {"tokens": 262144},
        "evaluate chat": {"sample_prompts": _QUESTIONS, "task_options": {"max_tokens": 128}},
    },
    "d20": {"train base": {"depth": 20}},
    "d26": {"train base": {"depth": 26}},
    "d32": {"train base": {"depth": 32}},
}
EMBEDDED = ("tiny", "cpu", "gpu")  # presets that generate their data
ON_CPU = ("tiny", "cpu")  # those that need no GPU
# what a job for one of them asks of a site that has more
ON_CPU_NEEDS = {"cpus": "2", "memory": "8G", "time": "1:00:00"}
SHARDS = {"d20": 240, "d26": 450, "d32": 800}  # of pretraining text, at 20 tokens per parameter and 4.8 bytes per token


def with_preset(config: T, command: str, preset: str) -> T:
    """The configuration of a command with a preset's values in place of its defaults."""
    return _replace(config, {"preset": preset, **PRESETS.get(preset, {}).get(command, {})}) if preset else config


def _replace(config: T, values: dict[str, Any]) -> T:
    known = {field.name for field in fields(config)}  # type: ignore[arg-type]
    unknown = set(values) - known
    if unknown:
        raise KeyError(f"{type(config).__name__} has no {sorted(unknown)}")
    nested = {
        name: _replace(getattr(config, name), value) if is_dataclass(getattr(config, name)) else value
        for name, value in values.items()
    }
    return replace(config, **nested)  # type: ignore[type-var]
