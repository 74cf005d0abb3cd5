"""The commands `nanochat evaluate base` and `nanochat evaluate chat`."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Literal

import tyro

from nanochat.checkpoint import load_model
from nanochat.console import say
from nanochat.data.loader import TokenStream
from nanochat.data.shards import Shards
from nanochat.errors import UserError
from nanochat.evaluate.bpb import bits_per_byte, unigram_bits_per_byte
from nanochat.evaluate.chat import TASKS, ChatOptions, evaluate_chat
from nanochat.evaluate.core import evaluate_core
from nanochat.gpt import Implementations
from nanochat.paths import Paths
from nanochat.presets import PresetOptions
from nanochat.runtime import Runtime


@dataclass(frozen=True)
class EvaluateBaseConfig(PresetOptions):
    """Measure bits per byte and CORE of a base model."""

    tokens: int = 20 * 524288
    """tokens of each split that bits per byte are measured on"""
    batch_size: int = 32
    """rows a process takes at once"""
    core_max_per_task: int = 500
    """items of each CORE task at most; negative: all"""
    device: str = "auto"
    """auto, cuda, cpu or mps"""
    impl: Implementations = field(default_factory=Implementations)


@dataclass(frozen=True)
class EvaluateChatConfig(PresetOptions):
    """Measure a chat model on multiple choice, word problems, code and spelling."""

    stage: Literal["mid", "sft"] = "sft"
    """whose newest checkpoint"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """which tasks"""
    device: str = "auto"
    """auto, cuda, cpu or mps"""
    options: Annotated[ChatOptions, tyro.conf.arg(name="")] = field(default_factory=ChatOptions)
    impl: Implementations = field(default_factory=Implementations)


def run_evaluate_base(config: EvaluateBaseConfig, paths: Paths, runtime: Runtime) -> dict[str, float]:
    model, tokenizer, _ = load_model(paths, "base", runtime, config.impl)
    rows, length = config.batch_size, model.config.context_length
    count = max(1, config.tokens // (rows * length * runtime.world_size))
    results = {}
    with ThreadPoolExecutor(4) as pool:
        streams = {
            split: TokenStream(Shards.of(paths, split), tokenizer, runtime.rank, runtime.world_size, pool)
            for split in ("train", "val")
        }
        batches = {split: list(islice(stream.batches(rows, length), count)) for split, stream in streams.items()}
    for split, part in batches.items():
        results[f"{split}_bpb"] = bits_per_byte(model, part, tokenizer.token_bytes, runtime)
    results["unigram_bpb"] = unigram_bits_per_byte(batches["train"], batches["val"], tokenizer.token_bytes)
    if runtime.primary:
        say(
            f"bits per byte: validation {results['val_bpb']:.4f}, train {results['train_bpb']:.4f}, "
            f"a unigram model {results['unigram_bpb']:.4f}"
        )
    results |= evaluate_core(model, tokenizer, paths.eval_bundle, runtime, config.core_max_per_task)
    _say_accuracies(results, runtime, skip=("val_bpb", "train_bpb", "unigram_bpb"))
    return results


def run_evaluate_chat(config: EvaluateChatConfig, paths: Paths, runtime: Runtime) -> dict[str, float]:
    unknown = [name for name in config.tasks if name not in TASKS]
    if unknown:
        raise UserError(f"unknown task {unknown[0]!r}; there are: {', '.join(TASKS)}")
    model, tokenizer, _ = load_model(paths, config.stage, runtime, config.impl)
    results = evaluate_chat(model, tokenizer, paths, runtime, config.options, config.tasks)
    _say_accuracies(results, runtime)
    return results


def _say_accuracies(results: dict[str, float], runtime: Runtime, skip: tuple[str, ...] = ()) -> None:
    if runtime.primary:
        for name, value in results.items():
            if name not in skip:
                say(f"{name:18} {value:.4f}")
