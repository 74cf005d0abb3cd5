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

LARGE = 2**29  # bytes, which take a noticeable time
TOGETHER = 16  # files between two exchanges with the other ranks


def fingerprint(files: Iterable[Path], known: Path, runtime: Runtime) -> str:
    """The SHA-256 of the names and contents of files, in hexadecimal. All ranks call it together, and the primary reads the files.

    known: a file that keeps the hash of each file with its size and the times of its last changes, so that it is read only once.
    Raises UserError on all ranks when a file cannot be read.
    """
    files, total = sorted(set(files)), hashlib.sha256()
    # a few files at a time: the other ranks would give up on one that does not answer for minutes
    for start in range(0, len(files), TOGETHER):
        problem, some = None, files[start : start + TOGETHER]
        if runtime.primary:
            try:
                for path, digest in _hashes_of(some, known, f"{start + len(some)} of {len(files)}").items():
                    total.update(f"{path.name}\0{digest}\n".encode())
            except OSError as error:
                problem = UserError(f"{error.filename} cannot be read ({error.strerror}); {remedy_for(error)}")
        problem = runtime.gather(problem)[0]
        if problem:
            raise problem
    return runtime.gather(total.hexdigest())[0]


def _hashes_of(files: list[Path], known: Path, progress: str) -> dict[Path, str]:
    before = read_json(known) or {}
    names = {path: str(path.resolve()) for path in files}
    # copies may keep the time of the content, but nobody sets that of the entry
    marks = {path: [s.st_size, s.st_mtime_ns, s.st_ctime_ns] for path in files for s in [path.stat()]}
    entries = {path: before.get(name) for path, name in names.items()}
    hashes = {
        path: entry[3]
        for path, entry in entries.items()
        if isinstance(entry, list) and len(entry) == 4 and entry[:3] == marks[path]
    }
    new = [path for path in files if path not in hashes]
    size = sum(marks[path][0] for path in new)
    if size > LARGE:
        say(f"reading {size / 1e9:.1f} GB of training data to know it again when the run is resumed ({progress} files)")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes |= zip(new, pool.map(sha256_of, new), strict=True)
    if new:
        with suppress(OSError):  # they are then read again in the next run
            write_json(known, before | {names[path]: [*marks[path], hashes[path]] for path in new})
    return {path: hashes[path] for path in files}
