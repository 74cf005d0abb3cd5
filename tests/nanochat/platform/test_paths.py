import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.platform.errors import UserError
from nanochat.platform.lock import locked
from nanochat.platform.paths import Paths, base_paths
from tests.conftest import assert_fails_with, environment, nanochat


def test_without_home_or_base_directory_there_is_a_clear_error(tmp_path):
    import os
    import subprocess
    import sys

    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "NANOCHAT_BASE_DIR")}
    result = subprocess.run(
        [sys.executable, "-m", "nanochat", "report"], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert_fails_with(result, "NANOCHAT_BASE_DIR")
    assert not list(tmp_path.iterdir())


READ_ONLY = """
import sys
from nanochat.cli import main
for arguments in sys.argv[1:]:
    print("==", arguments, flush=True)
    try:
        main(arguments.split())
    except SystemExit as exit:
        print("status", exit.code, flush=True)
"""


def test_commands_that_read_work_where_nothing_can_be_written(trained_base, tmp_path):
    """The base directory is a read-only mount, which not even root can write to."""
    commands = [
        "chat -p hello --max-tokens 3 --device cpu",
        "cluster status",
        "trace --stage sft --prompt hello",
        "evaluate chat --tasks SpellingBee --max-per-task 2 --max-tokens 3 --device cpu",
        "tokenizer eval",
        "report",
        "train sft --device cpu",
    ]
    mount = f"mount --bind {trained_base} {tmp_path} && mount -o remount,bind,ro {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine makes no mounts of its own")
    script = f'{mount} && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", READ_ONLY, *commands],
        capture_output=True, text=True, env=environment(tmp_path),
    )  # fmt: skip
    shown = dict(part.split("\n", 1) for part in done.stdout.split("== ")[1:])
    assert done.returncode == 0 and list(shown) == commands, done.stdout + done.stderr
    assert not any("status" in shown[command] for command in commands[:1] + commands[2:5]), done.stdout + done.stderr
    assert "base-eval" in shown["cluster status"] and "to come" in shown["cluster status"]
    assert "SpellingBee" in shown[commands[3]]
    assert all("the report will not have these results" in shown[command] for command in commands[3:5])
    assert all("status 1" in shown[command] for command in commands[5:])
    errors = done.stderr.strip().splitlines()
    assert len(errors) == 2 and all("Read-only file system" in error and "permissions" in error for error in errors), (
        errors
    )


def test_commands_that_read_make_no_base_directory(tmp_path):
    assert_fails_with(nanochat(tmp_path / "new", "chat", "-p", "hello"), "no checkpoint of sft")
    assert nanochat(tmp_path / "new", "cluster", "status").returncode == 0
    assert not (tmp_path / "new").exists()


def test_an_unwritable_base_directory_is_refused(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    assert_fails_with(nanochat(blocked / "base", "data", "generate"), str(blocked / "base"), "NANOCHAT_BASE_DIR")


def test_a_full_disk_leaves_no_probe(tmp_path, monkeypatch):
    def full(path, content, write=Path.write_bytes):
        write(path, b"")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="cannot write to the base directory .*No space left"):
        base_paths()
    assert not list(tmp_path.iterdir())


def test_a_base_directory_of_an_unknown_user(monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~nobody-of-this-name/x")
    with pytest.raises(
        UserError, match="NANOCHAT_BASE_DIR=~nobody-of-this-name/x: there is no such user; give an absolute path"
    ):
        base_paths()


def test_a_directory_without_a_part_of_a_run_is_none(tmp_path):
    (tmp_path / "runs" / "typo").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "tokenizer").mkdir(parents=True)
    assert Paths(tmp_path).runs == ["mine"]
    with locked(Paths(tmp_path, "new").lock("speedrun"), "speedrun"):  # a run that begins
        assert Paths(tmp_path).runs == ["mine", "new"]
    assert Paths(tmp_path).runs == ["mine"]
