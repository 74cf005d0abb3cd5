"""Assigns items to the train or test split by the hash of their text, so that the split is the same on every machine."""

import hashlib


def digest(*parts: object) -> int:
    """A 64-bit hash of the parts, the same on every machine and in every process, unlike Python's hash()."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def in_test(*parts: object, share: int = 10) -> bool:
    """Whether an item belongs to the test split, as one item in `share` does."""
    return digest("test", *parts) % share == 0
