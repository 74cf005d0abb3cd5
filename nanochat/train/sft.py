"""Fine-tuning: one conversation a row, loss only on what the assistant says."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from nanochat.checkpoint import load_model
from nanochat.console import say
from nanochat.data.conversations import First, Mixture, padded_batches, reposition
from nanochat.errors import UserError
from nanochat.gate import take_gate
from nanochat.gpt import Implementations
from nanochat.optim import MuonAdamW, OptimizerConfig
from nanochat.paths import Paths
from nanochat.presets import PresetOptions
from nanochat.runtime import Runtime
from nanochat.tasks import ARC, GSM8K, MMLU, Identity, SimpleSpelling, SmolTalk, SpellingBee
from nanochat.train.base import learning_settings
from nanochat.train.loop import RunOptions, Stage, Trainer, accumulation_steps


@dataclass(frozen=True)
class SftConfig(PresetOptions):
    """Fine-tune the midtrained model on conversations."""

    device_batch_size: int = 4
    """conversations a process takes at once"""
    examples_per_step: int = 32
    """conversations a step, over all processes and accumulation"""
    arc_easy: int = -1
    """easy multiple-choice questions; negative: all"""
    arc_challenge: int = -1
    """hard multiple-choice questions; negative: all"""
    mmlu: int = 0
    """further multiple-choice questions; negative: all"""
    gsm8k: int = -1
    """word problems; negative: all"""
    smoltalk: int = 10_000
    """general conversations; negative: all"""
    identity: int = 1000
    """conversations about the model itself; negative: all"""
    simple_spelling: int = 300
    """words to spell"""
    spelling_bee: int = 300
    """letters to count"""
    init_lr_fraction: float = 0.02
    """learning rate at the start, as a share of the optimizer's; it falls linearly to 0"""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = field(default_factory=OptimizerConfig)
    impl: Implementations = field(default_factory=Implementations)
    run: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)


def sft_mixture(config: SftConfig, paths: Paths) -> Mixture:
    tasks = [
        First(ARC(paths, "ARC-Easy", "train"), config.arc_easy),
        First(ARC(paths, "ARC-Challenge", "train"), config.arc_challenge),
        First(GSM8K(paths, "train"), config.gsm8k),
        First(SmolTalk(paths, "train"), config.smoltalk),
        First(Identity(paths), config.identity),
        SimpleSpelling(paths, "train", config.simple_spelling),
        SpellingBee(paths, "train", config.spelling_bee),
    ]
    if config.mmlu:
        tasks.append(First(MMLU(paths, "auxiliary_train"), config.mmlu))
    return Mixture(tasks)


def train_sft(config: SftConfig, paths: Paths, runtime: Runtime) -> dict:
    """Run or resume fine-tuning from the newest mid checkpoint; returns its results."""
    rows = config.device_batch_size
    model, tokenizer, mid_meta = load_model(
        paths, "mid", runtime, config.impl, adapt=lambda shape: take_gate(paths, shape, rows, runtime)
    )
    length = model.config.context_length
    accumulation = accumulation_steps(config.examples_per_step, rows, 1, runtime.world_size, "conversations")
    mixture = sft_mixture(config, paths)
    steps = len(mixture) // config.examples_per_step
    if steps < 1:
        raise UserError(f"{len(mixture)} conversations do not fill one step of {config.examples_per_step}; add some")
    if runtime.primary:
        say(f"{len(mixture):,} conversations: {', '.join(f'{k} {v:,}' for k, v in mixture.sizes().items())}")

    def batches(positions: list | None):
        position = reposition(positions, runtime.rank, runtime.world_size) if positions else (0,)
        return padded_batches(mixture, tokenizer, rows, length, runtime.rank, runtime.world_size, position)

    stage = Stage(
        name="sft",
        batches=batches,
        accumulation=accumulation,
        lr_multiplier=lambda progress: config.init_lr_fraction * (1 - progress),
        steps=steps,
        one_length=False,
    )
    settings = learning_settings(config) | {"mid_step": mid_meta["step"], "conversations": len(mixture)}
    optimizer = MuonAdamW(model, config.optimizer)
    results = Trainer(stage, model, optimizer, tokenizer, paths, runtime, config.run, settings).run()
    return {"conversations": len(mixture)} | results
