"""Byte-pair tokenizer: trained by rustbpe, run by tiktoken, stored as JSON; and the rendering of conversations.

A conversation is {"messages": [{"role", "content"}, …]}: an optional system message, then user and assistant in turn.
An assistant's content is text, or a list of parts {"type": "text" | "python" | "python_output", "text"}.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from nanochat.errors import UserError

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
PART_TYPES = {"text": None, "python": ("python_start", "python_end"), "python_output": ("output_start", "output_end")}


class Tokenizer:
    """ids 0 … are merges by rank, then the nine specials. Ordinary text never encodes to a special."""

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
        """Learn vocab_size − 9 − 256 merges from texts. Raises UserError for too small a vocabulary or no text."""
        smallest = 256 + len(SPECIALS)
        if vocab_size < smallest:
            raise UserError(
                f"vocab_size {vocab_size} is too small; it must be at least {smallest} (bytes and specials)"
            )
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIALS), pattern=PATTERN)
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        missing = vocab_size - len(SPECIALS) - len(ranks)
        if missing > 0:
            raise UserError(
                f"the text gives only {len(ranks) - 256} merges, {missing} fewer than vocab_size {vocab_size} needs; "
                f"give more text or vocab_size ≤ {vocab_size - missing}"
            )
        return cls([bytes(token) for token, _ in ranks])

    def save(self, directory: Path) -> None:
        """Write tokenizer.json (ranks in base64, pattern, specials) and token_bytes.npy, each whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        _write_whole(directory / "tokenizer.json", self._serialised)
        np.save(directory / "token_bytes.tmp.npy", self.token_bytes, allow_pickle=False)
        os.replace(directory / "token_bytes.tmp.npy", directory / "token_bytes.npy")

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        path = directory / "tokenizer.json"
        if not path.exists():
            raise UserError(f"no tokenizer in {directory}; make one with: nanochat tokenizer train")
        try:
            stored = json.loads(path.read_text("utf-8"))
            ranks = [base64.b64decode(token) for token in stored["ranks"]]
            return cls(ranks, stored["pattern"], stored["specials"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it and run: nanochat tokenizer train") from error

    @cached_property
    def _serialised(self) -> bytes:
        ranks = [base64.b64encode(token).decode("ascii") for token in self.ranks]
        stored = {"pattern": self.pattern, "specials": list(self.specials), "ranks": ranks}
        return json.dumps(stored, indent=0).encode("utf-8")

    @property
    def hash(self) -> str:
        """SHA-256 of the stored form; checkpoints carry it."""
        return hashlib.sha256(self._serialised).hexdigest()

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + len(self.specials)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 (V,): how many bytes of text each id stands for; 0 for specials."""
        return np.array([len(token) for token in self.ranks] + [0] * len(self.specials), dtype=np.int32)

    def special(self, name: str) -> int:
        return self._special_ids[name]

    def encode(self, text: str) -> list[int]:
        """ids of ordinary text. Raises UserError when it holds a lone surrogate, which no UTF-8 text can."""
        return self.encode_numpy(text).tolist()

    def encode_numpy(self, text: str) -> np.ndarray:
        """As encode, as an array, without holding the interpreter's lock."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
                "remove it, it cannot be written in UTF-8"
            ) from error

    def encode_batch(self, texts: Sequence[str], pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        """As encode_numpy for each text, on the pool's threads, in order."""
        return pool.map(self.encode_numpy, texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self._encoding.decode(list(ids))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self._encoding.decode_bytes(list(ids))

    def render(self, conversation: dict, max_tokens: int | None = None) -> tuple[list[int], list[int]]:
        """ids and mask of a conversation, cut at max_tokens. Mask 1 marks what the assistant has to produce itself."""
        ids, mask = [self.bos], [0]

        def add(tokens: list[int], trained: int) -> None:
            ids.extend(tokens)
            mask.extend([trained] * len(tokens))

        for message in check_conversation(conversation):
            if message["role"] == "user":
                add([self.special("user_start"), *self.encode(message["content"]), self.special("user_end")], 0)
                continue
            add([self.special("assistant_start")], 0)
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                tokens, frame = self.encode(part["text"]), PART_TYPES[part["type"]]
                if frame:
                    tokens = [self.special(frame[0]), *tokens, self.special(frame[1])]
                add(tokens, 0 if part["type"] == "python_output" else 1)
            add([self.special("assistant_end")], 1)
        return ids[:max_tokens], mask[:max_tokens]

    def render_prompt(self, conversation: dict) -> list[int]:
        """ids up to where the assistant's last answer begins: the last assistant message, if it is last, is dropped."""
        messages = conversation["messages"]
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        ids, _ = self.render({"messages": messages})
        return [*ids, self.special("assistant_start")]


def check_conversation(conversation: dict) -> list[dict]:
    """The messages with a system message merged into the first user message. Raises UserError when malformed."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(
            "malformed conversation: wanted {'messages': [{'role', 'content'}, …]} with one message or more"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"malformed conversation: message {index} needs the keys role and content, got {message!r}")
    if messages[0]["role"] == "system":
        if len(messages) < 2 or messages[1]["role"] != "user":
            raise UserError("malformed conversation: a system message must be followed by a user message")
        merged = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        messages = [merged, *messages[2:]]
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        expected = "user" if index % 2 == 0 else "assistant"
        if role != expected:
            raise UserError(f"malformed conversation: message {index} is from {role!r}, wanted {expected!r} in turn")
        if isinstance(content, str):
            continue
        if role == "user" or not isinstance(content, list):
            raise UserError(
                f"malformed conversation: message {index} ({role}) must be text, got {type(content).__name__}"
            )
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") not in PART_TYPES
                or not isinstance(part.get("text"), str)
            ):
                raise UserError(
                    f"malformed conversation: message {index} has a part that is not "
                    f"{{'type': {' | '.join(PART_TYPES)}, 'text'}}: {part!r}"
                )
    return messages


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
