"""The byte-pair tokenizer: rustbpe trains it, tiktoken encodes with it, and JSON stores it."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from nanochat.platform.errors import UserError
from nanochat.platform.files import read_shape, write_atomically

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIALS = tuple(
    f"<|{name}|>"
    for name in (
        "bos",
        "user_start",
        "user_end",
        "assistant_start",
        "assistant_end",
        "python_start",
        "python_end",
        "output_start",
        "output_end",
    )
)


# characters of white space in one run: the regular expressions of tiktoken and rustbpe fail when they have to go back further
LONGEST_SPACE = 999_998


def pieces_of(text: str) -> list[str]:
    """The text, cut inside of runs of white space that are longer than LONGEST_SPACE. The last piece of a run keeps its end."""
    if len(text) <= LONGEST_SPACE:
        return [text]
    runs = [run.span() for run in re.finditer(r"\s+", text)]
    cuts = [cut for start, end in runs for cut in range(start + LONGEST_SPACE, end, LONGEST_SPACE)]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


def encode_ordinary(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """The ids of a text without special tokens: those of the whole text if tiktoken can encode it, else those of its pieces."""

    def encode(part: str) -> np.ndarray:
        return encoding.encode_to_numpy(part, disallowed_special=())

    try:
        return encode(text)
    except UnicodeEncodeError:
        raise
    except ValueError:
        pieces = pieces_of(text)
        if len(pieces) == 1:
            raise
    return np.concatenate([encode(piece) for piece in pieces])


class Tokenizer:
    """Encodes text as token ids. The ids of bytes and merges come first, by rank, then those of the nine special tokens.

    Text never encodes to a special token, even if it spells one.
    """

    def __init__(self, ranks: Sequence[bytes], pattern: str = PATTERN, specials: Sequence[str] = SPECIALS):
        self.ranks, self.pattern, self.specials = list(ranks), pattern, tuple(specials)
        special_ids = {name: len(self.ranks) + i for i, name in enumerate(self.specials)}
        self._encoding = tiktoken.Encoding(
            name="nanochat",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.ranks)},
            special_tokens=special_ids,
        )
        self._special_ids = {name[2:-2]: i for name, i in special_ids.items()}
        self.bos = self.special("bos")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn vocab_size − 9 − 256 merges from texts. Raises UserError when the vocabulary or the text is too small."""
        smallest = 256 + len(SPECIALS)
        if vocab_size < smallest:
            raise UserError(
                f"vocab_size {vocab_size} is too small; it must be at least {smallest} (bytes and specials)"
            )
        trainer = rustbpe.Tokenizer()
        pieces = (piece for text in texts for piece in pieces_of(text))
        trainer.train_from_iterator(pieces, vocab_size - len(SPECIALS), pattern=PATTERN)
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        missing = vocab_size - len(SPECIALS) - len(ranks)
        if missing > 0:
            raise UserError(
                f"the text gives only {len(ranks) - 256} merges, {missing} fewer than vocab_size {vocab_size} needs; "
                f"give more text or vocab_size ≤ {vocab_size - missing}"
            )
        return cls([bytes(token) for token, _ in ranks])

    def save(self, directory: Path) -> None:
        """Write tokenizer.json (ranks in base64, pattern, special tokens) and token_bytes.npy, each atomically."""
        write_atomically(directory / "tokenizer.json", self._serialised)
        lengths = io.BytesIO()
        np.save(lengths, self.token_bytes, allow_pickle=False)
        write_atomically(directory / "token_bytes.npy", lengths.getvalue())

    @classmethod
    def load(cls, directory: Path, command: str = "nanochat tokenizer train") -> "Tokenizer":
        """The tokenizer that `save` wrote. Raises UserError, with the command that makes it, when it is missing or damaged."""
        path = directory / "tokenizer.json"
        if not path.exists():
            raise UserError(f"no tokenizer in {directory}; make one with: {command}")
        try:
            stored = read_shape(path, {"pattern": str, "specials": [str], "ranks": [str]})
            ranks = [base64.b64decode(token) for token in stored["ranks"]]
            complete = {bytes([i]) for i in range(256)} <= set(ranks) and set(SPECIALS) <= set(stored["specials"])
            if not stored["pattern"] or not complete:
                raise ValueError("it lacks the pattern, one of the 256 bytes or a special token")
            return cls(ranks, stored["pattern"], stored["specials"])
        except (ValueError, UserError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it and run: {command}") from error

    @cached_property
    def _serialised(self) -> bytes:
        ranks = [base64.b64encode(token).decode("ascii") for token in self.ranks]
        stored = {"pattern": self.pattern, "specials": list(self.specials), "ranks": ranks}
        return json.dumps(stored, indent=0).encode("utf-8")

    @property
    def hash(self) -> str:
        """SHA-256 of tokenizer.json, which checkpoints store."""
        return hashlib.sha256(self._serialised).hexdigest()

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + len(self.specials)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """The number of bytes of text of each token, int32 (V,); 0 for special tokens."""
        return np.array([len(token) for token in self.ranks] + [0] * len(self.specials), dtype=np.int32)

    def special(self, name: str) -> int:
        """The id of a special token, such as "bos"."""
        return self._special_ids[name]

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises UserError when it has a lone surrogate, which cannot be written in UTF-8."""
        return self.encode_numpy(text).tolist()

    def encode_numpy(self, text: str) -> np.ndarray:
        """The ids of a text as an array; other threads can run meanwhile."""
        try:
            return encode_ordinary(self._encoding, text)
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
                "remove it, it cannot be written in UTF-8"
            ) from error

    def encode_batch(self, texts: Sequence[str], pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        """The ids of each text as an array, in order, computed by the pool's threads."""
        return pool.map(self.encode_numpy, texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode(list(ids))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self._encoding.decode_bytes(list(ids))
