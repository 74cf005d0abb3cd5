"""Time the data loader alone, from local parquet files to batches, with the batch shape of production runs.

Eight GPUs train on 530,000 tokens/s, and a node with 16 cores must tokenise as many. The text resembles the production text in all
that costs time: ordinary words, a vocabulary of 32,768 learned from them, and about 4.5 bytes per token.
"""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.pretraining import TokenStream
from nanochat.data.shards import Shards
from nanochat.platform.paths import Paths
from nanochat.synthetic.world import words
from nanochat.tokenizer.bpe import Tokenizer

NODE_TOKENS_PER_SECOND = 530_000


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> tuple[Paths, Tokenizer]:
    """40 MB of documents with 400 words each, drawn from 60,000 words by a Zipf law."""
    paths, rng = Paths(tmp_path_factory.mktemp("prose")), random.Random(0)
    vocabulary = words(3, 60_000)
    rng.shuffle(vocabulary)
    weights = [1 / (rank + 10) for rank in range(len(vocabulary))]
    documents = [" ".join(rng.choices(vocabulary, weights, k=400)) + "." for _ in range(14_000)]
    paths.text.mkdir()
    for index in range(2):
        table = pa.table({"text": documents[index::2]})
        pq.write_table(table, paths.text / f"shard_{index:05d}.parquet", row_group_size=1024, compression="zstd")
    return paths, Tokenizer.train(documents, 32_768)


@pytest.mark.parametrize("threads", [1, 2])
def test_loader(benchmark, prose, threads):
    paths, tokenizer = prose
    rows, length, count = 32, 2048, 16
    with ThreadPoolExecutor(threads) as pool:
        stream = TokenStream(Shards.of(paths, "train"), tokenizer, 0, 1, pool)

        def consume() -> float:
            started = time.process_time()
            for _ in islice(stream.batches(rows, length), count):
                pass
            return time.process_time() - started

        cpu_seconds = benchmark.pedantic(consume, rounds=7, warmup_rounds=1)
    tokens = rows * length * count
    benchmark.extra_info["tokens_per_second"] = tokens / benchmark.stats["median"]
    benchmark.extra_info["tokens_per_cpu_second"] = tokens / cpu_seconds
    benchmark.extra_info["cores_for_8_gpus"] = NODE_TOKENS_PER_SECOND / (tokens / cpu_seconds)
