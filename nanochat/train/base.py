"""Pretraining on text."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Annotated

import tyro

from nanochat.console import say
from nanochat.data.loader import START, TokenStream, reposition
from nanochat.data.shards import Shards
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.evaluate.bpb import bits_per_byte
from nanochat.evaluate.core import evaluate_core
from nanochat.gate import take_gate
from nanochat.gpt import GPT, GPTConfig, Implementations
from nanochat.optim import MuonAdamW, OptimizerConfig
from nanochat.paths import Paths
from nanochat.presets import PresetOptions
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train.loop import Evaluation, RunOptions, Stage, Trainer, accumulation_steps

SAMPLE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


@dataclass(frozen=True)
class BaseConfig(PresetOptions):
    """Pretrain a model on text."""

    depth: int = 20
    """blocks; the width is 64 times as much"""
    context_length: int = 2048
    """tokens per row"""
    n_kv_head: int | None = None
    """key/value heads; as many as query heads when not given"""
    num_iterations: int = -1
    """steps; the first of num_iterations, target_flops and target_param_data_ratio that is positive sets the horizon"""
    target_flops: float = -1.0
    """FLOPs of the whole training"""
    target_param_data_ratio: float = 20.0
    """tokens trained on per parameter of the model"""
    device_batch_size: int = 32
    """rows a process takes at once"""
    total_batch_size: int = 524288
    """tokens a step, over all processes and accumulation"""
    warmdown_ratio: float = 0.2
    """share of training at the end over which the learning rate falls to 0"""
    eval_every: int = 250
    """steps between measurements of validation bits per byte"""
    eval_tokens: int = 20 * 524288
    """tokens of such a measurement"""
    core_metric_every: int = 2000
    """steps between evaluations of CORE; negative: never"""
    core_metric_max_per_task: int = 500
    """items of each CORE task at most"""
    sample_every: int = 2000
    """steps between samples of text; negative: never"""
    sample_prompts: tuple[str, ...] = SAMPLE_PROMPTS
    """what the samples go on from"""
    seed: int = 42
    """seed of the weights"""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = field(default_factory=OptimizerConfig)
    impl: Implementations = field(default_factory=Implementations)
    run: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)


def horizon(config: BaseConfig, model: GPTConfig) -> int:
    """Steps of pretraining. Raises UserError when no horizon is set or it is under one step."""
    if config.num_iterations > 0:
        return config.num_iterations
    if config.target_flops > 0:
        steps = round(config.target_flops / (model.flops_per_token * config.total_batch_size))
    elif config.target_param_data_ratio > 0:
        steps = int(config.target_param_data_ratio * model.num_parameters) // config.total_batch_size
    else:
        raise UserError("set one of num_iterations, target_flops and target_param_data_ratio to a positive number")
    if steps < 1:
        raise UserError(f"the horizon is under one step of {config.total_batch_size} tokens; raise it")
    return steps


def warmdown(ratio: float):
    """1, then linear to 0 over the last `ratio` of the progress."""
    return lambda progress: min(1.0, (1.0 - progress) / ratio) if ratio > 0 else 1.0


def learning_settings(config) -> dict:
    """Of a stage's configuration what decides what is learned; a resumed run must have the same. How many rows a process
    takes at once does not: a step is accumulated from as many as it takes."""
    free = ("preset", "impl", "run", "device_batch_size")
    return {key: value for key, value in _plain(asdict(config)).items() if key not in free}


def _plain(value):
    """As JSON gives it back, so that saved and given settings compare."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def train_base(config: BaseConfig, paths: Paths, runtime: Runtime) -> dict:
    """Run or resume pretraining; returns its results."""
    tokenizer = Tokenizer.load(paths.tokenizer)
    shape = GPTConfig.from_depth(
        config.depth, tokenizer.vocab_size, config.context_length, config.n_kv_head, impl=config.impl
    )
    rows, length = config.device_batch_size, config.context_length
    accumulation = accumulation_steps(config.total_batch_size, rows, length, runtime.world_size, "tokens")
    steps = horizon(config, shape)
    train, val = Shards.of(paths, "train"), Shards.of(paths, "val")
    shape = take_gate(paths, shape, rows, runtime)
    model = GPT.create(shape, runtime.device, runtime.compute_dtype, config.seed)
    if runtime.primary:
        say(
            f"depth {shape.depth}, width {shape.width}, {shape.num_parameters:,} parameters, "
            f"{shape.flops_per_token:.4e} FLOPs a token, {steps:,} steps of {config.total_batch_size:,} tokens = "
            f"{steps * config.total_batch_size:,} tokens, {steps * config.total_batch_size * shape.flops_per_token:.3e} FLOPs"
        )
    eval_batches = max(1, config.eval_tokens // (rows * length * runtime.world_size))
    with ThreadPoolExecutor(config.run.loader_threads) as pool:
        stream = TokenStream(train, tokenizer, runtime.rank, runtime.world_size, pool)
        held_out = TokenStream(val, tokenizer, runtime.rank, runtime.world_size, pool)

        def batches(positions: list | None):
            at = START if positions is None else _position(positions, runtime, train)
            return stream.batches(rows, length, at)

        def measure_bpb() -> dict:
            measured = islice(held_out.batches(rows, length), eval_batches)
            return {"val_bpb": bits_per_byte(model, measured, tokenizer.token_bytes, runtime)}

        def measure_core() -> dict:
            limit = config.core_metric_max_per_task
            return {"CORE": evaluate_core(model, tokenizer, paths.eval_bundle, runtime, limit)["CORE"]}

        def sample() -> dict:
            if runtime.primary:
                for line in sample_texts(model, tokenizer, config.sample_prompts):
                    say(f"  {line}")
            return {}

        stage = Stage(
            name="base",
            batches=batches,
            accumulation=accumulation,
            lr_multiplier=warmdown(config.warmdown_ratio),
            steps=steps,
            evaluations=[
                Evaluation(config.eval_every, measure_bpb, first=True),
                Evaluation(config.core_metric_every, measure_core),
                Evaluation(config.sample_every, sample),
            ],
        )
        optimizer = MuonAdamW(model, config.optimizer)
        trainer = Trainer(stage, model, optimizer, tokenizer, paths, runtime, config.run, learning_settings(config))
        results = trainer.run()
    shape_facts = {"parameters": shape.num_parameters, "flops_per_token": shape.flops_per_token}
    return shape_facts | {"total_flops": results["tokens"] * shape.flops_per_token} | results


def _position(positions: list, runtime: Runtime, shards: Shards):
    saved = [tuple(position) for position in positions]
    if len(saved) != runtime.world_size and runtime.primary:
        say(f"the checkpoint is of {len(saved)} processes, now {runtime.world_size}: row groups half read are skipped")
    return reposition(saved, runtime.world_size, runtime.rank, len(shards.row_groups))


def sample_texts(model: GPT, tokenizer: Tokenizer, prompts: tuple[str, ...], tokens: int = 16) -> list[str]:
    """Each prompt with what the model writes on, greedily."""
    ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    answers = Engine(model, tokenizer).generate(ids, tokens, temperature=0.0) if ids else []
    return [tokenizer.decode(prompt[1:] + answer) for prompt, answer in zip(ids, answers, strict=True)]
