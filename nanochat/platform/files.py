"""Writes files so that a kill at any instant leaves either the old content or the new one; and hashes them."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nanochat.platform.errors import UserError, remedy_for
from nanochat.platform.shapes import check_shape

MANIFEST = "manifest.json"
# seconds after which no process that writes a file can still be at it, whatever the clocks of other hosts say
LEFT_OVER = 3600


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the content of a file, or make the file with its directory; text is written as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    remove_leftovers(path.parent, f".{path.name}.*.tmp")
    try:
        with names_the_file(path):
            temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def names_the_file(path: Path) -> Iterator[None]:
    """Errors of the system in the block, such as a full disk, which writing does not say the file of, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def remove_leftovers(directory: Path, pattern: str) -> None:
    """Remove what killed processes left, by its pattern: each exists for a moment only, and these have for an hour."""
    for path in directory.glob(pattern):
        with suppress(OSError):  # another process removes it too, or it is another user's
            if time.time() - path.lstat().st_mtime > LEFT_OVER:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_json(path: Path, content: dict) -> None:
    """Replace the content of a file by a dictionary as JSON; values that JSON does not know are written as their str."""
    write_atomically(path, json.dumps(content, indent=1, default=str) + "\n")


def read_shape(path: Path, shape: object, parse: Callable[[str], object] = json.loads) -> Any:
    """The content of a text file, which has a shape (see check_shape). Raises UserError for a file that is not so, with the place."""
    try:
        content = parse(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy_for(error)}") from error
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "nested too deeply"
        raise UserError(f"{path} cannot be read ({reason})") from error
    check_shape(content, shape, str(path))
    return content


def read_json(path: Path, shape: dict | None = None) -> dict | None:
    """The dictionary that write_json wrote; None when the file is missing or damaged, or has another shape (see check_shape)."""
    try:
        return read_shape(path, shape or {str: object})
    except UserError:
        return None


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """The number of each line that is not blank, and its value: a ValueError where the line is no JSON in UTF-8.

    Lines end with a line feed alone: U+2028 and other separators may stand inside of the texts.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put at the beginning
            if line.strip():
                try:
                    value = json.loads(line.decode("utf-8"))
                    if b"\\u" in line:  # half of a character, which is written so, is none
                        json.dumps(value, ensure_ascii=False).encode("utf-8")
                    yield number, value
                except (ValueError, RecursionError) as error:
                    yield number, error if isinstance(error, ValueError) else ValueError("nested too deeply")


def read_json_lines(path: Path) -> list[tuple[int, object]]:
    """As json_lines, of a file in which every line counts. Raises UserError for one that is no JSON in UTF-8."""
    lines = []
    try:
        for number, value in json_lines(path):
            if isinstance(value, ValueError):
                raise UserError(f"{path}, line {number} is no JSON in UTF-8 ({value}); correct the line")
            lines.append((number, value))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy_for(error)}") from error
    return lines


@contextmanager
def fresh_directory(final: Path) -> Iterator[Path]:
    """Give the block an empty temporary directory, which replaces `final` when the block ends without an error.

    A kill between the two renames at the end leaves `final` under another name; the next call puts it back first. Raises UserError
    when the directory cannot be made or put in place. An error of the block is raised as it is.
    """
    temporary, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")

    def tidy() -> None:
        if old.exists() and not final.exists():
            old.rename(final)
        for directory in (temporary, old):
            shutil.rmtree(directory, ignore_errors=True)

    tidy()
    try:
        with _reported_as_unwritable(final):
            temporary.mkdir(parents=True)
        yield temporary
        with _reported_as_unwritable(final):  # not around the block, whose errors may be about other files
            if final.exists():
                final.rename(old)
            temporary.rename(final)
    finally:
        tidy()


@contextmanager
def _reported_as_unwritable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); {remedy_for(error)}, then run the command again"
        ) from error


def all_files(directory: Path) -> list[Path]:
    """All files in a directory and below it, and all symbolic links, which are not followed; sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())


def write_manifest(directory: Path) -> None:
    """Write the hashes of all files of a directory into it, by which foreign_files recognises them."""
    write_json(directory / MANIFEST, {str(p.relative_to(directory)): sha256_of(p) for p in all_files(directory)})


def foreign_files(directory: Path) -> list[Path]:
    """The files of a directory that were added, or changed, since its manifest was written; all of them if it has none."""
    known = read_json(directory / MANIFEST) or {}
    if not known:
        return all_files(directory)
    files = [path for path in all_files(directory) if path != directory / MANIFEST]
    return [path for path in files if not _has_hash(path, known.get(str(path.relative_to(directory))))]


def _has_hash(path: Path, digest: str | None) -> bool:
    """Whether it is a file with this content; other things, such as a pipe, are not opened."""
    return digest is not None and not path.is_symlink() and path.is_file() and sha256_of(path) == digest


def name_some(files: list[Path]) -> str:
    """The first few of some files, and the number of the others, for a message."""
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return ", ".join(map(str, files[:3])) + more


def flush(path: Path) -> None:
    """Write a file or directory through to the disk, so that its content survives the loss of the node."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal; the file is read in pieces of one MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
