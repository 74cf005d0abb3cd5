"""The embedded data at the size of the cpu preset, made once for all suites."""

import pytest

from nanochat.data.generate import GenerateConfig, generate
from nanochat.data.shards import Shards
from nanochat.paths import Paths
from nanochat.presets import PRESETS
from nanochat.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Paths:
    paths = Paths(tmp_path_factory.mktemp("bench"))
    generate(GenerateConfig(), paths)
    return paths


@pytest.fixture(scope="session")
def texts(world) -> list[str]:
    return list(Shards.of(world, "train").documents())


@pytest.fixture(scope="session")
def tokenizer(texts) -> Tokenizer:
    return Tokenizer.train(texts, PRESETS["cpu"]["tokenizer train"]["vocab_size"])
