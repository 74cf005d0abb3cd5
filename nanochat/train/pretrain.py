"""Pretraining on text, with measurements of bits per byte and CORE, and samples, on the way."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial

from nanochat.checkpoint import CheckpointStore
from nanochat.data.fingerprint import fingerprint
from nanochat.data.positions import START, TextPosition, text_position
from nanochat.data.pretraining import TokenStream, measured_batches
from nanochat.data.shards import Shards
from nanochat.evaluate.bits_per_byte import bits_per_byte
from nanochat.evaluate.core import evaluate_core, load_bundle
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.engine import Engine
from nanochat.optim import MuonAdamW
from nanochat.options.train import TrainBaseOptions
from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime
from nanochat.platform.paths import Paths
from nanochat.tokenizer.bpe import Tokenizer
from nanochat.train.plan import Evaluation, Plan, gated_step_size, horizon, learning_settings
from nanochat.train.schedules import trapezoid
from nanochat.train.trainer import Trainer


def pretrain(options: TrainBaseOptions, paths: Paths, runtime: Runtime) -> dict:
    """`nanochat train base`: run or resume pretraining; returns its results."""
    tokenizer = Tokenizer.load(paths.tokenizer, f"{paths.make_tokenizer}{paths.other_runs}")
    shape = GPTConfig.from_depth(
        options.depth, tokenizer.vocab_size, options.context_length, options.n_kv_head, impl=options.impl,
        recompute=options.run.recompute,
    )  # fmt: skip
    length, store = options.context_length, CheckpointStore(paths.checkpoints("base"), runtime)
    shape, micro_step_ms, (rows, accumulation, total) = gated_step_size(options, "base", paths, shape, store)
    steps = horizon(replace(options, total_batch_size=total), shape)
    train, val = Shards.of(paths, "train"), Shards.of(paths, "val")
    if options.core_metric_every >= 0:
        load_bundle(paths.eval_bundle)  # a mistake in it is found now, and not after hours
    store.check_model(shape)
    model = GPT.create(shape, runtime.device, runtime.compute_dtype, options.seed)
    if runtime.primary:
        say(
            f"depth {shape.depth}, width {shape.width}, {shape.num_parameters:,} parameters, "
            f"{shape.flops_per_token:.4e} FLOPs per token, {steps:,} steps of {total:,} tokens = "
            f"{steps * total:,} tokens, {steps * total * shape.flops_per_token:.3e} FLOPs"
        )
    with ThreadPoolExecutor(options.run.loader_threads) as pool:
        stream = TokenStream(train, tokenizer, runtime.rank, runtime.world_size, pool)
        held_out = cache(
            partial(
                measured_batches,
                val,
                tokenizer,
                runtime.rank,
                runtime.world_size,
                pool,
                rows,
                length,
                options.eval_tokens,
            )
        )

        def batches(positions: list | None):
            return stream.batches(rows, length, _position(positions, runtime, train))

        def measure_bpb() -> dict:
            return {"val_bpb": bits_per_byte(model, held_out(), tokenizer.token_bytes, runtime)}

        def measure_core() -> dict:
            limit = options.core_metric_max_per_task
            return {"CORE": evaluate_core(model, tokenizer, paths.eval_bundle, runtime, limit)["CORE"]}

        def sample() -> dict:
            if runtime.primary:
                for line in sample_texts(model, tokenizer, options.sample_prompts):
                    say(f"  {line}")
            return {}

        plan = Plan(
            stage="base",
            batches=batches,
            rows=rows,
            accumulation=accumulation,
            lr_multiplier=trapezoid(
                options.warmup_ratio, options.warmdown_ratio, options.final_lr_fraction, step=1 / steps
            ),
            steps=steps,
            evaluations=[
                Evaluation(options.eval_every, measure_bpb, first=True),
                Evaluation(options.core_metric_every, measure_core),
                Evaluation(options.sample_every, sample),
            ],
        )
        optimizer = MuonAdamW(model, options.optimizer)
        settings = learning_settings(options) | {"step_size": total}
        settings["data"] = fingerprint(train.files, paths.hashes, runtime)
        trainer = Trainer(plan, model, optimizer, tokenizer, paths, runtime, options.run, settings, micro_step_ms)
        results = trainer.run()
    shape_facts = {"parameters": shape.num_parameters, "flops_per_token": shape.flops_per_token}
    return shape_facts | {"total_flops": results["tokens"] * shape.flops_per_token} | results


def _position(positions: list | None, runtime: Runtime, shards: Shards) -> TextPosition:
    """The position at which this rank continues, from the saved positions of all ranks; None: at the beginning."""
    if positions is None:
        return START
    saved = [tuple(position) for position in positions]
    if len(saved) != runtime.world_size and runtime.primary:
        say(
            f"the checkpoint was written by {len(saved)} processes, and now there are {runtime.world_size}: row groups that "
            "were partly read are skipped"
        )
    return text_position(saved, runtime.rank, runtime.world_size, len(shards.row_groups))


def sample_texts(model: GPT, tokenizer: Tokenizer, prompts: tuple[str, ...], tokens: int = 16) -> list[str]:
    """Each prompt with the model's greedy continuation of it."""
    ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    answers = Engine(model, tokenizer).generate(ids, tokens, temperature=0.0) if ids else []
    return [tokenizer.decode(prompt[1:] + answer) for prompt, answer in zip(ids, answers, strict=True)]
