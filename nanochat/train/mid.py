"""Midtraining: the format of conversations, tools and multiple choice, on one epoch of a mixture packed into a stream."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from nanochat.checkpoint import load_model
from nanochat.console import say
from nanochat.data.conversations import First, Mixture, packed_batches, reposition
from nanochat.errors import UserError
from nanochat.evaluate.bpb import bits_per_byte
from nanochat.gate import take_gate
from nanochat.gpt import Implementations
from nanochat.optim import MuonAdamW, OptimizerConfig
from nanochat.paths import Paths
from nanochat.presets import PresetOptions
from nanochat.runtime import Runtime
from nanochat.tasks import GSM8K, MMLU, Identity, SimpleSpelling, SmolTalk, SpellingBee
from nanochat.train.base import learning_settings, warmdown
from nanochat.train.loop import Evaluation, RunOptions, Stage, Trainer, accumulation_steps


@dataclass(frozen=True)
class MidConfig(PresetOptions):
    """Midtrain the base model on conversations."""

    device_batch_size: int = 32
    """rows a process takes at once"""
    total_batch_size: int = 524288
    """tokens a step, over all processes and accumulation"""
    smoltalk: int = -1
    """general conversations; negative: all"""
    mmlu: int = -1
    """multiple-choice questions; negative: all"""
    gsm8k: int = -1
    """word problems; negative: all"""
    identity_repeats: int = 2
    """times the identity conversations come"""
    simple_spelling: int = 200_000
    """words to spell"""
    spelling_bee: int = 80_000
    """letters to count"""
    warmdown_ratio: float = 0.2
    """share of training at the end over which the learning rate falls to 0"""
    eval_every: int = 150
    """steps between measurements of bits per byte on held-out conversations"""
    eval_rows: int = 2048
    """held-out conversations of such a measurement"""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = field(default_factory=OptimizerConfig)
    impl: Implementations = field(default_factory=Implementations)
    run: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)


def mid_mixture(config: MidConfig, paths: Paths) -> Mixture:
    return Mixture(
        [
            First(SmolTalk(paths, "train"), config.smoltalk),
            First(MMLU(paths, "auxiliary_train"), config.mmlu),
            First(GSM8K(paths, "train"), config.gsm8k),
            *[Identity(paths)] * config.identity_repeats,
            SimpleSpelling(paths, "train", config.simple_spelling),
            SpellingBee(paths, "train", config.spelling_bee),
        ]
    )


def train_mid(config: MidConfig, paths: Paths, runtime: Runtime) -> dict:
    """Run or resume midtraining from the newest base checkpoint; returns its results."""
    rows = config.device_batch_size
    model, tokenizer, base_meta = load_model(
        paths, "base", runtime, config.impl, adapt=lambda shape: take_gate(paths, shape, rows, runtime)
    )
    length = model.config.context_length
    accumulation = accumulation_steps(config.total_batch_size, rows, length, runtime.world_size, "tokens")
    mixture = mid_mixture(config, paths)
    held_out = Mixture([First(SmolTalk(paths, "test"), config.eval_rows), GSM8K(paths, "test"), MMLU(paths, "test")])
    if runtime.primary:
        say(f"{len(mixture):,} conversations: {', '.join(f'{k} {v:,}' for k, v in mixture.sizes().items())}")

    def batches(positions: list | None):
        position = reposition(positions, runtime.rank, runtime.world_size) if positions else (0, 0)
        return packed_batches(mixture, tokenizer, rows, length, runtime.rank, runtime.world_size, position)

    def measure_bpb() -> dict:
        # few rows at a time, so that a small held-out set fills whole batches on every rank
        measured = packed_batches(held_out, tokenizer, 1, length, runtime.rank, runtime.world_size)
        return {"val_bpb": bits_per_byte(model, measured, tokenizer.token_bytes, runtime)}

    stage = Stage(
        name="mid",
        batches=batches,
        accumulation=accumulation,
        lr_multiplier=warmdown(config.warmdown_ratio),
        steps=None,
        evaluations=[Evaluation(config.eval_every, measure_bpb, first=True)],
    )
    settings = learning_settings(config) | {"base_step": base_meta["step"], "conversations": len(mixture)}
    optimizer = MuonAdamW(model, config.optimizer)
    results = Trainer(stage, model, optimizer, tokenizer, paths, runtime, config.run, settings).run()
    if results["steps"] == 0:
        raise UserError(
            f"{len(mixture)} conversations do not fill one step of {config.total_batch_size} tokens; "
            "add conversations or lower --total-batch-size"
        )
    return {"conversations": len(mixture)} | results
