"""Fine-tuning: one conversation per row, with loss only on the assistant's own tokens."""

from nanochat.checkpoint import CheckpointStore, create_model, find_checkpoint, weights_hash
from nanochat.data.conversations import Limited, Mixture, measured_batches, padded_batches
from nanochat.data.fingerprint import fingerprint
from nanochat.data.positions import conversation_position
from nanochat.evaluate.bits_per_byte import mean_loss
from nanochat.evaluate.chat import chat_accuracies
from nanochat.gate import take_gate
from nanochat.gpt import GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.options.evaluate import ChatTaskOptions
from nanochat.options.train import TrainSftOptions
from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.tasks import ARC, GSM8K, MMLU, CustomJSON, Identity, SimpleSpelling, SmolTalk, SpellingBee
from nanochat.train.plan import Evaluation, Plan, learning_settings, step_size
from nanochat.train.schedules import full_momentum, linear_decay
from nanochat.train.trainer import Trainer


def sft_mixture(options: TrainSftOptions, paths: Paths) -> Mixture:
    """The conversations of fine-tuning, shuffled."""
    tasks = [
        Limited(ARC(paths, "ARC-Easy", "train"), options.arc_easy),
        Limited(ARC(paths, "ARC-Challenge", "train"), options.arc_challenge),
        Limited(GSM8K(paths, "train"), options.gsm8k),
        Limited(SmolTalk(paths, "train"), options.smoltalk),
        Limited(Identity(paths), options.identity),
        SimpleSpelling(paths, "train", options.simple_spelling),
        SpellingBee(paths, "train", options.spelling_bee),
        *map(CustomJSON, options.custom_json),
    ]
    if options.mmlu:
        tasks.append(Limited(MMLU(paths, "auxiliary_train"), options.mmlu))
    return Mixture(tasks * options.num_epochs)


def finetune(options: TrainSftOptions, paths: Paths, runtime: Runtime) -> dict:
    """`nanochat train sft`: run or resume fine-tuning, from the newest checkpoint of its source; returns its results."""
    path, tokenizer, source_meta = find_checkpoint(paths, options.source, runtime)
    shape = GPTConfig(**source_meta["config"], impl=options.impl, recompute=options.run.recompute)
    rows, accumulation, total = step_size(options, "sft", 1, CheckpointStore(paths.checkpoints("sft"), runtime))
    shape, micro_step_ms = take_gate(paths, shape, rows, runtime, options.run.deterministic)
    model = create_model(path, shape, runtime, source_meta)
    length = shape.context_length
    mixture, held_out = sft_mixture(options, paths), Mixture([Limited(SmolTalk(paths, "test"), options.eval_rows)])
    steps = len(mixture) // total
    if options.num_iterations > 0:
        steps = min(steps, options.num_iterations)
    if steps < 1:
        raise UserError(f"{len(mixture)} conversations do not fill one step of {total}; add some")
    if runtime.primary:
        say(f"{len(mixture):,} conversations: {', '.join(f'{k} {v:,}' for k, v in mixture.sizes().items())}")

    def batches(positions: list | None):
        position = conversation_position(positions, runtime.rank, runtime.world_size) if positions else (0,)
        return padded_batches(mixture, tokenizer, rows, length, runtime.rank, runtime.world_size, position)

    def measure_loss() -> dict:
        measured = measured_batches(held_out, tokenizer, rows, length, runtime.rank, runtime.world_size)
        return {"val_loss": mean_loss(model, measured, runtime)}

    def measure_accuracy() -> dict:
        chosen = ChatTaskOptions(max_per_task=options.chat_metric_max_per_task)
        return chat_accuracies(model, tokenizer, paths, runtime, chosen, ("ARC-Easy", "MMLU"))

    plan = Plan(
        stage="sft",
        batches=batches,
        rows=rows,
        accumulation=accumulation,
        lr_multiplier=linear_decay(options.init_lr_fraction),
        momentum=full_momentum,
        steps=steps,
        one_length=False,
        evaluations=[
            Evaluation(options.eval_every, measure_loss, first=True),
            Evaluation(options.chat_metric_every, measure_accuracy),
        ],
    )
    settings = learning_settings(options) | {
        f"{options.source}_step": source_meta["step"],
        "conversations": len(mixture),
    }
    settings |= {"step_size": total, "first_weights": weights_hash(source_meta)}
    settings["data"] = fingerprint(mixture.files(), paths.hashes, runtime)
    optimizer = MuonAdamW(model, options.optimizer)
    trainer = Trainer(plan, model, optimizer, tokenizer, paths, runtime, options.run, settings, micro_step_ms)
    results = trainer.run()
    return {"conversations": len(mixture)} | results
