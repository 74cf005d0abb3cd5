"""Deals items to train or test by the hash of their text, so that the split is the same on every machine."""

import hashlib


def digest(*parts: object) -> int:
    """A 64-bit number that depends on the parts alone, on every machine."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def in_test(*parts: object, share: int = 10) -> bool:
    """Whether an item belongs to the test split: one in `share` does."""
    return digest("test", *parts) % share == 0
