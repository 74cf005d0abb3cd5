"""Runs for benchmarks: one with a model of random weights as if it had been fine-tuned, and one with text like that of production."""

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanochat.checkpoint import CheckpointStore, save_model
from nanochat.data.shards import Shards
from nanochat.gpt import GPTConfig
from nanochat.options.data import GenerateOptions
from nanochat.platform.distributed import Runtime
from nanochat.platform.paths import Paths, base_paths
from nanochat.synthetic.generate import generate
from nanochat.synthetic.world import words
from nanochat.tokenizer.bpe import Tokenizer
from nanochat.train.timing import trained_model

DATA = GenerateOptions(shards=1, documents=1024, chats=1, questions=8, problems=1024, identity=1, words=300, tests=8)
TRAINED_TOKENS = 1024  # of the vocabulary; the small text gives no more merges than a few thousand


@contextmanager
def run_to_measure(run_name: str, depth: int, vocab_size: int) -> Iterator[Paths]:
    """Give the block the paths of a run, or with a depth above 0 those of a new one, as `random_run` makes it."""
    if not depth:
        yield base_paths(True).of_run(run_name)
        return
    with random_run(depth, vocab_size) as paths:
        yield paths


@contextmanager
def random_run(depth: int, vocab_size: int, data: GenerateOptions = DATA) -> Iterator[Paths]:
    """Make a run in a temporary folder, give the block its paths, and delete it. Raises UserError for sizes that no model can have.

    Its answers never end before their maximum: special tokens have the logit 0, which is not among the most likely ones.
    """
    shape = GPTConfig.from_depth(depth, vocab_size)
    with tempfile.TemporaryDirectory(prefix="nanochat-bench-") as folder:
        paths = Paths(Path(folder)).of_run("random")
        generate(data, paths)
        trained = Tokenizer.train(Shards.of(paths, "train").documents(), min(vocab_size, TRAINED_TOKENS))
        # the rest of the vocabulary: text that the pattern splits, so that no prompt has it
        made_up = (f" {number:05d}".encode() for number in range(vocab_size))
        tokenizer = Tokenizer([*trained.ranks, *islice(made_up, vocab_size - trained.vocab_size)])
        tokenizer.save(paths.tokenizer)
        device = torch.device("cpu")
        model = trained_model(shape, device, torch.float32)
        with torch.no_grad():
            model.head.weight[len(tokenizer.ranks) :] = 0
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        store = CheckpointStore(paths.checkpoints("sft"), Runtime(0, 1, device, torch.float32))
        save_model(store, 0, shape, weights, {"tokenizer": tokenizer.hash})
        del model, weights
        yield paths


@contextmanager
def prose_run(shards: int = 1) -> Iterator[Paths]:
    """Make a run in a temporary folder with text and a tokenizer that cost as much time as those of production: ordinary words, a
    vocabulary of 32,768 learned from them, and about 4.5 bytes per token. shards: with 7 row groups each, besides one for validation.
    """
    rng, vocabulary = random.Random(0), words(3, 60_000)
    rng.shuffle(vocabulary)
    weights = [1 / (rank + 10) for rank in range(len(vocabulary))]  # a Zipf law
    with tempfile.TemporaryDirectory(prefix="nanochat-bench-") as folder:
        paths = Paths(Path(folder))
        paths.text.mkdir()
        documents = [" ".join(rng.choices(vocabulary, weights, k=400)) + "." for _ in range(7 * 1024)]
        for index in range(shards + 1):
            table = pa.table({"text": documents[index:] + documents[:index]})
            pq.write_table(table, paths.text / f"shard_{index:05d}.parquet", row_group_size=1024, compression="zstd")
        Tokenizer.train(documents, 32_768).save(paths.tokenizer)
        yield paths
