"""A hash of the files that a run learns from, by which a resumed run notices that they have changed."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError, remedy_for
from nanochat.platform.files import read_json, sha256_of, write_json

LARGE = 4 * 2**30  # bytes, which take a few seconds
TOGETHER = 16  # files between two exchanges with the other ranks


def fingerprint(files: Iterable[Path], known: Path, runtime: Runtime) -> str:
    """The SHA-256 of the names and contents of files, in hexadecimal. All ranks call it together, and the primary reads the files.

    known: a file that keeps the hash of each file with its size and time of change, so that it is read only once. Raises
    UserError on all ranks when a file cannot be read.
    """
    files, found = sorted(set(files)), ""
    # a few at a time: the other ranks would give up on one that does not answer for minutes, and what is read is not read again
    for end in range(TOGETHER, len(files) + TOGETHER, TOGETHER):
        if runtime.primary:
            try:
                found = _hash_of(files[:end], known)
            except OSError as error:
                found = UserError(f"{error.filename} cannot be read ({error.strerror}); {remedy_for(error)}")
        found = runtime.gather(found)[0]
        if isinstance(found, UserError):
            raise found
    return found


def _hash_of(files: list[Path], known: Path) -> str:
    before = read_json(known) or {}
    states = {path: (str(path.resolve()), path.stat()) for path in files}
    marks = {path: [stat.st_size, stat.st_mtime_ns] for path, (_, stat) in states.items()}
    hashes = {}
    for path, (name, _) in states.items():
        entry = before.get(name)
        if isinstance(entry, list) and entry[:2] == marks[path] and len(entry) == 3:
            hashes[path] = entry[2]
    new = [path for path in files if path not in hashes]
    size = sum(marks[path][0] for path in new)
    if size > LARGE // 8:
        say(f"reading {size / 1e9:.1f} GB of training data once, to know them again when the run is resumed")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes |= zip(new, pool.map(sha256_of, new), strict=True)
    if new:
        with suppress(OSError):  # they are then read again
            write_json(known, before | {states[path][0]: [*marks[path], hashes[path]] for path in new})
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.name}\0{hashes[path]}\n".encode())
    return total.hexdigest()
