"""The hash of the training data: it follows names and contents, and files that have not changed are read once."""

import os
import shutil
from dataclasses import replace

import pytest

from nanochat.data import fingerprint as module
from nanochat.data.fingerprint import fingerprint
from nanochat.platform.errors import UserError


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "data" / name for name in ("a", "b")]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    return paths


def test_it_follows_names_and_contents_and_nothing_else(files, tmp_path, cpu):
    first = fingerprint(files, tmp_path / "known.json", cpu)
    assert fingerprint([*files[::-1], files[0]], tmp_path / "other.json", cpu) == first
    copied = shutil.copytree(files[0].parent, tmp_path / "elsewhere")
    assert fingerprint(list(copied.iterdir()), tmp_path / "known.json", cpu) == first
    found = {first}
    for change in (
        lambda: files[0].write_bytes(b"A" * 1000),
        lambda: files[1].write_bytes(b""),
        lambda: files.append(shutil.copy(files[0], files[0].with_name("c"))),
        lambda: files.pop(0),
        lambda: files.append(files.pop().rename(files[0].with_name("z"))),
    ):
        change()
        found.add(fingerprint(files, tmp_path / "known.json", cpu))
    assert len(found) == 6


def test_files_that_have_not_changed_are_read_once(files, tmp_path, cpu, monkeypatch):
    read = []
    monkeypatch.setattr(module, "sha256_of", lambda path: read.append(path.name) or path.name * 32)
    known = tmp_path / "known.json"
    first = fingerprint(files, known, cpu)
    assert fingerprint(files, known, cpu) == first and sorted(read) == ["a", "b"]
    files[1].write_bytes(b"longer" * 1000)
    fingerprint(files, known, cpu)
    assert read[2:] == ["b"]
    for damage in ("{", "[1]", "[" * 100_000, '{"' + str(files[0]) + '": 7}'):
        known.write_text(damage)
        read.clear()
        assert fingerprint(files, known, cpu) and sorted(read) == ["a", "b"]


def test_other_contents_of_the_same_size_and_time_are_noticed(files, tmp_path, cpu):
    """As a copy leaves them that keeps the time."""
    first, times = fingerprint(files, tmp_path / "known.json", cpu), files[0].stat()
    files[0].write_bytes(b"A" * times.st_size)
    os.utime(files[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(files, tmp_path / "known.json", cpu) != first


def test_many_files_are_read_a_few_at_a_time(files, tmp_path, cpu, monkeypatch):
    """Between them the other ranks hear from the primary, and what is read is kept: also where it cannot be written down."""
    whole = fingerprint(files, tmp_path / "known.json", cpu)
    monkeypatch.setattr(module, "TOGETHER", 1)
    monkeypatch.setattr(module, "write_json", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    asked = []
    runtime = replace(cpu)
    monkeypatch.setattr(type(runtime), "gather", lambda self, value: asked.append(value) or [value])
    assert fingerprint(files, tmp_path / "none.json", runtime) == whole and asked == [None, None, whole]


def test_a_file_that_cannot_be_read_is_named(files, tmp_path, cpu):
    files[1].unlink()
    with pytest.raises(UserError, match=r"data/b cannot be read \(No such file or directory\)"):
        fingerprint(files, tmp_path / "known.json", cpu)
