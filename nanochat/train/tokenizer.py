"""Training the tokenizer on the pretraining text."""

from collections.abc import Iterator
from dataclasses import dataclass

from nanochat.checkpoint import HOW_TO_MAKE
from nanochat.console import progress_bar, say
from nanochat.data.shards import Shards
from nanochat.errors import UserError
from nanochat.paths import Paths
from nanochat.presets import PresetOptions
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizerConfig(PresetOptions):
    """Train the tokenizer on the pretraining text."""

    vocab_size: int = 65536
    """tokens, the nine special ones included"""
    max_chars: int = 2_000_000_000
    """characters of text to train on at most"""
    doc_cap: int = 10_000
    """characters of each document at most"""


def train_tokenizer(config: TokenizerConfig, paths: Paths) -> dict:
    """Train and store; refuses to replace a tokenizer that checkpoints depend on by a different one."""
    shards = Shards.of(paths, "train")
    total = 0

    def texts(advance) -> Iterator[str]:
        nonlocal total
        for index in range(len(shards.row_groups)):
            for text in shards.read(index):
                text = text[: config.doc_cap]
                yield text
                total += len(text)
                if total >= config.max_chars:
                    return
            advance()

    with progress_bar("read text for the tokenizer", len(shards.row_groups)) as advance:
        tokenizer = Tokenizer.train(texts(advance), config.vocab_size)
    existing = Tokenizer.load(paths.tokenizer) if (paths.tokenizer / "tokenizer.json").exists() else None
    if existing is not None and existing.hash != tokenizer.hash:
        dependent = [stage for stage in HOW_TO_MAKE if any(paths.checkpoints(stage).glob("step_*"))]
        if dependent:
            raise UserError(
                f"the tokenizer in {paths.tokenizer} would change, but checkpoints depend on it: {', '.join(dependent)}; "
                "remove those checkpoints first, or train in another NANOCHAT_BASE_DIR"
            )
    tokenizer.save(paths.tokenizer)
    lengths = tokenizer.token_bytes[tokenizer.token_bytes > 0]
    say(f"tokenizer of {tokenizer.vocab_size:,} tokens from {total:,} characters in {paths.tokenizer}")
    return {"vocab_size": tokenizer.vocab_size, "characters": total, "mean_token_bytes": float(lengths.mean())}
