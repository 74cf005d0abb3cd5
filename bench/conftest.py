"""Synthetic data in the size of the cpu preset, generated once for all suites."""

import pytest

from nanochat.data.shards import Shards
from nanochat.options.data import GenerateOptions
from nanochat.options.presets import PRESETS
from nanochat.platform.paths import Paths
from nanochat.synthetic.generate import generate
from nanochat.tokenizer.bpe import Tokenizer


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Paths:
    paths = Paths(tmp_path_factory.mktemp("bench"))
    generate(GenerateOptions(), paths)
    return paths


@pytest.fixture(scope="session")
def texts(world) -> list[str]:
    return list(Shards.of(world, "train").documents())


@pytest.fixture(scope="session")
def tokenizer(texts) -> Tokenizer:
    return Tokenizer.train(texts, PRESETS["cpu"]["tokenizer train"]["vocab_size"])
