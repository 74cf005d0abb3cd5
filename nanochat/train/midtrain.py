"""Midtraining: teaches the format of conversations, tools and multiple choice, in one epoch of a mixture packed into a stream."""

from functools import cache
from itertools import islice

from nanochat.checkpoint import CheckpointStore, create_model, find_checkpoint, weights_hash
from nanochat.data.batches import Batch
from nanochat.data.conversations import Limited, Mixture, packed_batches
from nanochat.data.fingerprint import fingerprint
from nanochat.data.positions import conversation_position
from nanochat.evaluate.bits_per_byte import bits_per_byte
from nanochat.gpt import GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.options.train import TrainMidOptions
from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime
from nanochat.platform.paths import Paths
from nanochat.tasks import GSM8K, MMLU, CustomJSON, Identity, SimpleSpelling, SmolTalk, SpellingBee
from nanochat.train.plan import Evaluation, Plan, gated_step_size, learning_settings
from nanochat.train.schedules import trapezoid
from nanochat.train.trainer import Trainer

# rows of the test splits, in about the proportion in which the mixture has the tasks
HELD_OUT_MMLU, HELD_OUT_GSM8K = 5200, 420


def mid_mixture(options: TrainMidOptions, paths: Paths) -> Mixture:
    """The conversations of midtraining, shuffled."""
    return Mixture(
        [
            Limited(SmolTalk(paths, "train"), options.smoltalk),
            Limited(MMLU(paths, "auxiliary_train"), options.mmlu),
            Limited(GSM8K(paths, "train"), options.gsm8k),
            *[Identity(paths)] * options.identity_repeats,
            SimpleSpelling(paths, "train", options.simple_spelling),
            SpellingBee(paths, "train", options.spelling_bee),
            *map(CustomJSON, options.custom_json),
        ]
    )


def midtrain(options: TrainMidOptions, paths: Paths, runtime: Runtime) -> dict:
    """`nanochat train mid`: run or resume midtraining, from the newest checkpoint of pretraining; returns its results."""
    path, tokenizer, base_meta = find_checkpoint(paths, "base", runtime)
    shape = GPTConfig(**base_meta["config"], impl=options.impl, recompute=options.run.recompute)
    length, store = shape.context_length, CheckpointStore(paths.checkpoints("mid"), runtime)
    shape, micro_step_ms, (rows, accumulation, total) = gated_step_size(options, "mid", paths, shape, store)
    model = create_model(path, shape, runtime, base_meta)
    mixture = mid_mixture(options, paths)
    held_out = Mixture(
        [
            Limited(SmolTalk(paths, "test"), options.eval_rows),
            Limited(MMLU(paths, "test"), HELD_OUT_MMLU),
            Limited(GSM8K(paths, "test"), HELD_OUT_GSM8K),
        ]
    )
    if runtime.primary:
        say(f"{len(mixture):,} conversations: {', '.join(f'{k} {v:,}' for k, v in mixture.sizes().items())}")

    def batches(positions: list | None):
        position = conversation_position(positions, runtime.rank, runtime.world_size) if positions else (0, 0)
        return packed_batches(mixture, tokenizer, rows, length, runtime.rank, runtime.world_size, position)

    @cache
    def measured() -> list[Batch]:
        # every world_size-th batch of all, so that the number of ranks changes nothing; of one row, so that little is dropped
        return list(islice(packed_batches(held_out, tokenizer, 1, length), runtime.rank, None, runtime.world_size))

    def measure_bpb() -> dict:
        return {"val_bpb": bits_per_byte(model, measured(), tokenizer.token_bytes, runtime)}

    schedule = trapezoid(0.0, options.warmdown_ratio)
    plan = Plan(
        stage="mid",
        batches=batches,
        rows=rows,
        accumulation=accumulation,
        lr_multiplier=lambda progress: options.init_lr_fraction * schedule(progress),
        steps=options.num_iterations if options.num_iterations > 0 else None,
        evaluations=[Evaluation(options.eval_every, measure_bpb, first=True)],
    )
    settings = learning_settings(options) | {"base_step": base_meta["step"], "conversations": len(mixture)}
    settings |= {"step_size": total, "first_weights": weights_hash(base_meta)}
    settings["data"] = fingerprint(mixture.files(), paths.hashes, runtime)
    optimizer = MuonAdamW(model, options.optimizer)
    trainer = Trainer(plan, model, optimizer, tokenizer, paths, runtime, options.run, settings, micro_step_ms)
    results = trainer.run()
    return {"conversations": len(mixture)} | results
