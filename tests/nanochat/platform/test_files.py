"""Files and directories are replaced as a whole or not at all."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.platform import files
from nanochat.platform.errors import UserError
from nanochat.platform.files import fresh_directory, read_json, sha256_of, write_atomically, write_json


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    write_atomically(path, "old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_what_a_killed_write_left_is_removed_by_a_later_one(tmp_path):
    path, killed, other = tmp_path / "a.json", tmp_path / ".a.json.123.tmp", tmp_path / ".b.json.123.tmp"
    killed.touch(), other.touch()
    write_atomically(path, "1")
    assert killed.exists(), "it may be that of another process, which is writing"
    for file in (killed, other):
        os.utime(file, (time.time() - 2 * 3600,) * 2)
    write_atomically(path, "2")
    assert sorted(tmp_path.iterdir()) == [other, path]


def test_json_comes_back_and_damaged_json_is_none(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path) is None
    write_json(path, {"path": tmp_path, "n": 1})
    assert read_json(path) == {"path": str(tmp_path), "n": 1}
    path.write_text('{"n": ')
    assert read_json(path) is None


@pytest.mark.parametrize("error", [ValueError("stop"), FileNotFoundError(2, "No such file", "elsewhere")])
def test_a_directory_is_replaced_only_when_it_is_complete(tmp_path, error):
    """An error of the block is raised as it is, also one of the operating system about another file."""
    final = tmp_path / "data"
    with fresh_directory(final) as directory:
        (directory / "one").write_text("1")
    with pytest.raises(type(error)) as raised, fresh_directory(final) as directory:
        (directory / "two").write_text("2")
        raise error
    assert raised.value is error
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "one"]
    with fresh_directory(final) as directory:
        (directory / "two").write_text("2")
    assert [path.name for path in final.iterdir()] == ["two"]


@pytest.mark.parametrize("method", ["mkdir", "rename"])
@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left"), "free some space"),
        (PermissionError(errno.EACCES, "Permission denied"), "check the path and its permissions"),
        (OSError(errno.EROFS, "Read-only file system"), "check the path and its permissions"),
        (OSError(errno.EIO, "Input/output error"), "check the path and its disk"),
        (FileExistsError(errno.EEXIST, "File exists"), "move away what is there, or choose another path"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "check the path"),
    ],
)
def test_a_directory_that_cannot_be_written_is_a_users_error(tmp_path, monkeypatch, method, error, remedy):
    monkeypatch.setattr(f"pathlib.Path.{method}", lambda *_, **__: (_ for _ in ()).throw(error))
    message = f"cannot write .*data .{error.strerror}.; {remedy}, then"
    with pytest.raises(UserError, match=message), fresh_directory(tmp_path / "data"):
        pass
    assert not list(tmp_path.iterdir())


KILLED = """
import os, pathlib, sys
from nanochat.platform.files import fresh_directory
def rename(path, target, original=pathlib.Path.rename, calls=[]):
    calls.append(path)
    if len(calls) == {call}:
        os._exit(9)
    return original(path, target)
pathlib.Path.rename = rename
with fresh_directory(pathlib.Path(sys.argv[1])) as directory:
    (directory / "content").write_text("new")
"""


@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_between_the_renames_does_not_lose_the_old_directory(tmp_path, call):
    final = tmp_path / "data"
    final.mkdir()
    (final / "content").write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED.format(call=call), str(final)])
    assert killed.returncode == 9 and final.exists() == (call == 1)
    with pytest.raises(KeyboardInterrupt), fresh_directory(final):
        assert (final / "content").read_text() == "old"
        raise KeyboardInterrupt
    assert (final / "content").read_text() == "old" and list(tmp_path.iterdir()) == [final]


def test_an_error_between_the_renames_puts_the_old_directory_back(tmp_path, monkeypatch):
    final = tmp_path / "data"
    final.mkdir()

    def rename(path, target, original=Path.rename):
        if path.name == ".data.tmp":
            raise OSError(errno.ENOSPC, "No space left")
        return original(path, target)

    monkeypatch.setattr("pathlib.Path.rename", rename)
    with pytest.raises(UserError, match="free some space"), fresh_directory(final) as directory:
        (directory / "content").write_text("new")
    assert list(tmp_path.rglob("*")) == [final]


def test_hash(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x").startswith("ba7816bf")


def test_foreign_files_are_not_read_where_nothing_is_known_of_them(tmp_path, monkeypatch):
    """Neither a whole home directory nor a pipe, which nobody may ever write to."""
    (tmp_path / "mine").touch()
    os.mkfifo(tmp_path / "pipe")
    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256_of", lambda path: pytest.fail(f"{path} was read"))
        assert files.foreign_files(tmp_path) == [tmp_path / "mine", tmp_path / "pipe"]
    files.write_json(tmp_path / files.MANIFEST, {"mine": files.sha256_of(tmp_path / "mine"), "pipe": "0"})
    assert files.foreign_files(tmp_path) == [tmp_path / "pipe"]


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'here'}'"):
        files.write_atomically(tmp_path / "here", "text")
