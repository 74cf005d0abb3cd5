"""A lock says who holds it, and a holder that was killed holds it no longer, on any host and any storage."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from nanochat.platform import lock
from nanochat.platform.errors import UserError
from nanochat.platform.lock import locked
from tests.conftest import environment


@pytest.fixture
def quick(monkeypatch):
    """Heartbeats of 0.05 s; without one for 0.4 s a holder on another host is dead."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "DEAD", 0.4)


def test_a_lock_names_its_holder_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    path = tmp_path / "base.lock"
    with locked(path, "train base"):
        holder = json.loads(path.read_text())
        assert (holder["process"], holder["job"], holder["command"]) == (os.getpid(), "4711", "train base")
        message = (
            f"another train base is running in {tmp_path} .process {os.getpid()} on {holder['host']}, job 4711, "
            f"since {holder['since']}.; wait for it.*remove {path}"
        )
        with pytest.raises(UserError, match=message), locked(path, "train base"):
            pass
        assert json.loads(path.read_text()) == holder
    assert not list(tmp_path.iterdir())


def test_an_error_releases_it(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="of the block"), locked(tmp_path / "a.lock", "a"):
            raise ValueError("of the block")
    assert not list(tmp_path.iterdir())


def test_the_directories_that_it_made_are_removed_unless_one_has_files(tmp_path):
    with locked(tmp_path / "runs" / "new" / "a.lock", "test"):
        pass
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "runs" / "new" / "a.lock", "test"):
        (tmp_path / "runs" / "kept").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["kept"]


@pytest.mark.parametrize("what", ["the directory", "the lock"])
def test_what_is_removed_under_a_command_ends_it_with_an_error(tmp_path, what):
    """Also when the command ends before its next heartbeat: what it wrote is not there."""
    folder = tmp_path / "base" / "runs" / "a"
    told = f"{folder} was removed while" if what == "the directory" else "a.lock was removed or taken"
    with pytest.raises(UserError, match=told), locked(folder / "a.lock", "a"):
        if what == "the directory":
            shutil.rmtree(tmp_path / "base")
        else:
            (folder / "a.lock").unlink()
    assert not folder.exists()
    with pytest.raises(ValueError, match="of the block"), locked(folder / "a.lock", "a"):
        shutil.rmtree(tmp_path / "base")
        raise ValueError("of the block")


def left_behind(path, ending: str) -> dict:
    """The lock of a process that ended without releasing it."""
    script = "import os, pathlib, signal, sys\nfrom nanochat.platform.lock import locked\n"
    script += f"with locked(pathlib.Path(sys.argv[1]), 'a'):\n    {ending}"
    subprocess.run([sys.executable, "-c", script, str(path)], env=environment(None))
    return json.loads(path.read_text())


def test_the_lock_of_a_killed_process_of_this_host_is_taken_at_once(tmp_path, capsys):
    path = tmp_path / "a.lock"
    left_behind(path, "os.kill(os.getpid(), signal.SIGKILL)")
    with locked(path, "a"):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir()) and "waiting" not in capsys.readouterr().out


def test_a_process_that_has_the_number_of_a_dead_holder_is_not_taken_for_it(tmp_path):
    path = tmp_path / "a.lock"
    with locked(path, "a"):
        holder = json.loads(path.read_text())
    path.write_text(json.dumps(holder | {"started": "1"}))
    with locked(path, "a"):
        assert json.loads(path.read_text()) == holder | {"since": json.loads(path.read_text())["since"]}


@pytest.mark.parametrize(
    "content", ['{"host": "node07", "process": 1, "started": "1", "job": "", "since": "then"}', "", "[]"]
)
@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_host_is_known_by_its_heartbeat(tmp_path, quick, capsys, content, alive):
    """Or one whose name cannot be read."""
    path, ended = tmp_path / "a.lock", threading.Event()
    path.write_text(content)

    def beat():
        while not ended.wait(0.05):
            os.utime(path)

    other = threading.Thread(target=beat)
    if alive:
        other.start()
    try:
        if alive:
            who = "process 1 on node07, since then" if "node07" in content else "a process that left no name"
            with pytest.raises(UserError, match=f"another a is running .*{who}"), locked(path, "a"):
                pass
        else:
            with locked(path, "a"):
                assert json.loads(path.read_text())["process"] == os.getpid()
            assert not list(tmp_path.iterdir())
    finally:
        ended.set()
        if alive:
            other.join()
    assert "for its heartbeat" in capsys.readouterr().out


def test_of_many_that_find_a_dead_holder_one_gets_the_lock(tmp_path, quick):
    path, inside, results = tmp_path / "a.lock", [], []
    path.write_text('{"host": "node07"}')
    start = threading.Barrier(8)

    def contend():
        start.wait()
        try:
            with locked(path, "a"):
                inside.append(1)
                time.sleep(1)
                results.append(len(inside))
        except UserError:
            pass

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("heard", [True, False])
def test_heartbeats_change_the_time_and_a_holder_that_lost_its_lock_ends(tmp_path, heard):
    """Also if nobody hears why: its terminal is closed."""
    script = """
import json, pathlib, sys, time
from nanochat.platform import lock
lock.BEAT = 0.05
path = pathlib.Path(sys.argv[1])
with lock.locked(path, "a"):
    first = path.stat().st_mtime_ns
    time.sleep(0.5)
    assert path.stat().st_mtime_ns > first
    path.unlink()
    path.write_text(json.dumps({"host": "another"}))
    time.sleep(60)
"""
    path = tmp_path / "a.lock"
    reader, writer = os.pipe()
    if not heard:
        os.close(reader)
    done = subprocess.run([sys.executable, "-c", script, str(path)], env=environment(None), stderr=writer, timeout=50)
    os.close(writer)
    assert done.returncode == 1
    if heard:
        with open(reader) as said:
            assert said.read().startswith(f"nanochat: error: the lock {path} was removed or taken")
    assert json.loads(path.read_text()) == {"host": "another"}
