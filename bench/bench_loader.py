"""Time the data loader alone, from local parquet files to batches, with the batch shape of production runs.

Eight GPUs train on 530,000 tokens/s, and a node with 16 cores must tokenise as many.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest

from bench.random_run import prose_run
from nanochat.data.pretraining import TokenStream
from nanochat.data.shards import Shards
from nanochat.platform.paths import Paths
from nanochat.tokenizer.bpe import Tokenizer

NODE_TOKENS_PER_SECOND = 530_000


@pytest.fixture(scope="module")
def prose() -> Iterator[tuple[Paths, Tokenizer]]:
    with prose_run() as paths:
        yield paths, Tokenizer.load(paths.tokenizer)


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
