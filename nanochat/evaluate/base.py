"""`nanochat evaluate base`: bits per byte and CORE of a pretrained model, or CORE of one of the transformers library."""

from concurrent.futures import ThreadPoolExecutor

from nanochat.checkpoint import load_model
from nanochat.data.pretraining import measured_batches
from nanochat.data.shards import Shards
from nanochat.evaluate.bits_per_byte import bits_per_byte, unigram_bits_per_byte
from nanochat.evaluate.chat import not_newest, say_accuracies
from nanochat.evaluate.core import CoreTask, core_scores, load_bundle
from nanochat.evaluate.scope import scope_of
from nanochat.evaluate.scores import as_results, write_csv
from nanochat.evaluate.transformers_model import load_transformers, slug
from nanochat.gpt import GPT
from nanochat.options.evaluate import NOT_REPORTED, EvaluateBaseOptions
from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.tokenizer.bpe import Tokenizer


def evaluate_base(options: EvaluateBaseOptions, paths: Paths, runtime: Runtime) -> dict[str, float]:
    """`nanochat evaluate base`: evaluate a checkpoint of pretraining by bits per byte and CORE, or another model by CORE.

    Bits per byte are measured on both splits, with those of a unigram model beside them. Results of an older checkpoint, and those
    of less than the report has, come with the reason why it does not show them, as NOT_REPORTED. Raises UserError for unknown tasks,
    and for the step of another model.
    """
    reason = ""
    if options.hf_path:
        if options.checkpoint is not None:
            raise UserError(
                f"--step {options.step} is of a checkpoint, and --hf-path names another model; leave one of them out"
            )
        model, tokenizer = load_transformers(options.hf_path, runtime)
        file = f"hf-eval_{slug(options.hf_path)}"
    else:
        model, tokenizer, meta = load_model(paths, "base", runtime, options.impl, options.checkpoint)
        file = f"base-eval_{meta['step']:06d}"
        reason = not_newest(paths, "base", meta["step"])
    bundle = load_bundle(paths.eval_bundle)
    tasks = _chosen_tasks(options, bundle)
    scope = scope_of(options, "evaluate base", paths, [task.label for task in bundle])
    results = {} if options.hf_path else _bits_per_byte(model, tokenizer, options, paths, runtime)
    scores = core_scores(model, tokenizer, tasks, runtime, options.core_max_per_task)
    core = as_results(scores, "" if scope.less.keys() & {"core-tasks", "core-max-per-task"} else "CORE")
    if runtime.primary:
        say_accuracies(core, paths)
        if paths.writable:
            mean = {name: value for name, value in core.items() if name == "CORE"}
            write_csv(paths.report / f"{file}{scope.suffix}.csv", scores, mean | results)
    reason = reason or scope.kept
    return results | core | ({NOT_REPORTED: reason} if reason else {})


def _chosen_tasks(options: EvaluateBaseOptions, bundle: list[CoreTask]) -> list[CoreTask]:
    """Each task that the options name, once; all of them if they name none."""
    tasks = {task.label: task for task in bundle}
    unknown = [name for name in options.core_tasks if name not in tasks]
    if unknown:
        raise UserError(f"unknown task {unknown[0]!r} of CORE; choose from: {', '.join(tasks)}")
    return [tasks[name] for name in dict.fromkeys(options.core_tasks or tasks)]


def _bits_per_byte(
    model: GPT, tokenizer: Tokenizer, options: EvaluateBaseOptions, paths: Paths, runtime: Runtime
) -> dict[str, float]:
    size = options.batch_size, model.config.context_length, options.tokens
    results = {}
    with ThreadPoolExecutor(4) as pool:
        batches = {
            split: measured_batches(Shards.of(paths, split), tokenizer, runtime.rank, runtime.world_size, pool, *size)
            for split in ("train", "val")
        }
    for split, part in batches.items():
        results[f"{split}_bpb"] = bits_per_byte(model, part, tokenizer.token_bytes, runtime)
    results["unigram_bpb"] = unigram_bits_per_byte(batches["train"], batches["val"], tokenizer.token_bytes, runtime)
    if runtime.primary:
        say(
            f"bits per byte: validation {results['val_bpb']:.4f}, train {results['train_bpb']:.4f}, "
            f"a unigram model {results['unigram_bpb']:.4f}"
        )
    return results
