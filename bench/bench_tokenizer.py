"""Time the training of the tokenizer, and encoding with one and two threads. extra_info: tokens or characters per second."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from nanochat.tokenizer.bpe import Tokenizer


def test_train(benchmark, texts):
    benchmark.pedantic(Tokenizer.train, (texts, 1024), rounds=5, warmup_rounds=1)
    benchmark.extra_info["characters_per_second"] = sum(map(len, texts)) / benchmark.stats["median"]


@pytest.mark.parametrize("threads", [1, 2])
def test_encode(benchmark, texts, tokenizer, threads):
    some = texts[:4096]
    with ThreadPoolExecutor(threads) as pool:
        encoded = benchmark.pedantic(lambda: list(tokenizer.encode_batch(some, pool)), rounds=9, warmup_rounds=1)
    benchmark.extra_info["tokens_per_second"] = sum(map(len, encoded)) / benchmark.stats["median"]
    benchmark.extra_info["bytes_per_second"] = sum(len(t.encode()) for t in some) / benchmark.stats["median"]
