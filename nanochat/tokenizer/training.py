"""Training the tokenizer on the pretraining text."""

from collections.abc import Iterator

from nanochat.data.shards import Shards
from nanochat.options.tokenizer import TokenizerTrainOptions
from nanochat.platform.console import progress, say
from nanochat.platform.errors import UserError
from nanochat.platform.paths import TRAINING_STAGES, Paths, steps_in
from nanochat.tokenizer.bpe import Tokenizer


def train_tokenizer(options: TokenizerTrainOptions, paths: Paths) -> dict:
    """`nanochat tokenizer train`: train a tokenizer and store it; returns its size and the characters that it was trained on.

    Raises UserError when checkpoints depend on a stored tokenizer and the new one differs from it.
    """
    shards = Shards.of(paths, "train")
    total = 0  # characters

    def texts(advance) -> Iterator[str]:
        nonlocal total
        for index in range(len(shards.row_groups)):
            for text in shards.read(index):
                text = text[: options.doc_cap]
                yield text
                total += len(text)
                if total >= options.max_chars:
                    return
            advance()
        if not total:
            raise shards.without_text(range(len(shards.row_groups)))

    with progress("read text for the tokenizer", len(shards.row_groups)) as advance:
        tokenizer = Tokenizer.train(texts(advance), options.vocab_size)
    existing = (
        Tokenizer.load(paths.tokenizer, paths.make_tokenizer) if (paths.tokenizer / "tokenizer.json").exists() else None
    )
    if existing is not None and existing.hash != tokenizer.hash:
        dependent = [stage for stage in TRAINING_STAGES if steps_in(paths.checkpoints(stage))]
        if dependent:
            raise UserError(
                f"the tokenizer in {paths.tokenizer} would change, but checkpoints depend on it: {', '.join(dependent)}; "
                "move those checkpoints away first, or give the new tokenizer a run of its own: --run-name NAME"
            )
    tokenizer.save(paths.tokenizer)
    lengths = tokenizer.token_bytes[tokenizer.token_bytes > 0]
    say(f"tokenizer of {tokenizer.vocab_size:,} tokens from {total:,} characters in {paths.tokenizer}")
    return {"vocab_size": tokenizer.vocab_size, "characters": total, "mean_token_bytes": float(lengths.mean())}
