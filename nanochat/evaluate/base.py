"""`nanochat evaluate base`: bits per byte and CORE of a pretrained model."""

from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from nanochat.checkpoint import load_model
from nanochat.data.pretraining import TokenStream
from nanochat.data.shards import Shards
from nanochat.evaluate.bits_per_byte import bits_per_byte, unigram_bits_per_byte
from nanochat.evaluate.chat import say_accuracies
from nanochat.evaluate.core import evaluate_core
from nanochat.options.evaluate import EvaluateBaseOptions
from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime
from nanochat.platform.paths import Paths


def evaluate_base(options: EvaluateBaseOptions, paths: Paths, runtime: Runtime) -> dict[str, float]:
    """Evaluate the newest base checkpoint: bits per byte of both splits, those of a unigram model, and CORE with its tasks."""
    model, tokenizer, _ = load_model(paths, "base", runtime, options.impl)
    rows, length = options.batch_size, model.config.context_length
    count = max(1, options.tokens // (rows * length * runtime.world_size))
    results = {}
    with ThreadPoolExecutor(4) as pool:
        streams = {
            split: TokenStream(Shards.of(paths, split), tokenizer, runtime.rank, runtime.world_size, pool)
            for split in ("train", "val")
        }
        batches = {split: list(islice(stream.batches(rows, length), count)) for split, stream in streams.items()}
    for split, part in batches.items():
        results[f"{split}_bpb"] = bits_per_byte(model, part, tokenizer.token_bytes, runtime)
    results["unigram_bpb"] = unigram_bits_per_byte(batches["train"], batches["val"], tokenizer.token_bytes, runtime)
    if runtime.primary:
        say(
            f"bits per byte: validation {results['val_bpb']:.4f}, train {results['train_bpb']:.4f}, "
            f"a unigram model {results['unigram_bpb']:.4f}"
        )
    core = evaluate_core(model, tokenizer, paths.eval_bundle, runtime, options.core_max_per_task)
    if runtime.primary:
        say_accuracies(core, paths)
    return results | core
