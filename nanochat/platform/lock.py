"""Locks on what a command writes. They work on any storage, and say who holds them.

A lock is a file that only one process can create. It names its holder: host, process, Slurm job, command, since when. flock
would not do: clusters mount Lustre without it, or with one that other nodes do not see. Instead a holder that was killed is
recognised: on the same host by its process, which is gone, and on another host by its heartbeat, which has stopped.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from nanochat.platform.console import say
from nanochat.platform.environment import slurm_job_id
from nanochat.platform.errors import UserError
from nanochat.platform.files import names_the_file, remove_leftovers
from nanochat.platform.shapes import check_shape

BEAT = 10.0  # seconds between two heartbeats, each of which changes the time of the file
DEAD = 60.0  # a holder on another host is dead when its file has not changed for so many seconds


class Seen(NamedTuple):
    """A lock file as it was read: its holder, empty if the file is damaged, and the time of its last change."""

    holder: dict
    changed: int  # in nanoseconds, by the clock of the storage or of the holder: only to be compared with itself


@contextmanager
def locked(path: Path, command: str) -> Iterator[None]:
    """Hold the lock while the block runs. Raises UserError, with its holder, when another process holds it.

    The process ends at once if it loses the lock, because another one may write the same files from then on.
    """
    mine = {
        **_place(),
        "process": os.getpid(),
        "started": _start_of(os.getpid()),
        "job": slurm_job_id(),
        "command": command,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    made = [directory for directory in path.parents if not directory.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    _acquire(path, mine)
    released = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, mine, released), name="nanochat-lock", daemon=True)
    heart.start()
    try:
        yield
        seen = _read(path)
        if seen is None or seen.holder != mine:
            raise UserError(_lost(path))
    finally:
        released.set()
        heart.join()
        _remove(path, mine)
        with suppress(OSError):  # one has files
            for directory in made:
                directory.rmdir()


HOLDER = {"host": str, "process": int, "started": str, "job": str, "since": str}


def _acquire(path: Path, mine: dict) -> None:
    while True:
        with suppress(FileExistsError):
            with path.open("x", encoding="utf-8") as file:
                try:
                    with names_the_file(path):
                        file.write(json.dumps(mine))
                        file.flush()
                except OSError:
                    path.unlink(missing_ok=True)  # an empty lock would seem to be another's
                    raise
            return
        seen = _read(path)
        if seen is None:  # removed since
            continue
        if not _is_dead(path, seen):
            if _read(path) is None:
                continue
            raise UserError(_held(path, mine["command"], seen.holder))
        _remove_dead(path, seen)


def _remove_dead(path: Path, seen: Seen) -> None:
    """Remove the lock of a dead holder, unless another process has done so; that one may hold the lock by now."""
    remove_leftovers(path.parent, f"{path.name}.[0-9]*")
    claim = path.with_name(f"{path.name}.{seen.changed}")  # who makes this file removes the lock
    try:
        claim.open("x").close()
    except FileExistsError:
        time.sleep(0.1)
        with suppress(FileNotFoundError):
            if time.time() - claim.stat().st_mtime > DEAD:  # its maker was killed
                claim.unlink()
        return
    try:
        if _read(path) == seen:
            path.unlink(missing_ok=True)
    finally:
        claim.unlink(missing_ok=True)


def holder(path: Path) -> dict | None:
    """Who holds the lock; None when nobody does. Empty for a file that is damaged.

    A heartbeat of this minute is believed. Another one may be by a clock that differs from this host's: this waits for the next.
    """
    seen = _read(path)
    if seen is None:
        return None
    alive = _lives_here(seen)
    if alive is None:
        alive = abs(time.time() - seen.changed / 1e9) < DEAD or _beats(path, seen, 2 * BEAT)
    return seen.holder if alive else None


def described(holder: dict) -> str:
    """Who holds a lock, for a message."""
    if not holder:
        return "a process that left no name"
    job = f", job {holder['job']}" if holder["job"] else ""
    return f"process {holder['process']} on {holder['host']}{job}, since {holder['since']}"


def _held(path: Path, command: str, holder: dict) -> str:
    return (
        f"another {holder.get('command', command)} is running in {path.parent} ({described(holder)}); wait for it or end it; if it is "
        f"certain that it no longer runs, remove {path}"
    )


def _is_dead(path: Path, seen: Seen) -> bool:
    """Whether a holder no longer lives; to know it of one on another host, this watches its heartbeat."""
    alive = _lives_here(seen)
    return not (_beats(path, seen, DEAD) if alive is None else alive)


def _beats(path: Path, seen: Seen, seconds: float) -> bool:
    """Whether a lock changes within some seconds."""
    host = seen.holder.get("host", "an unknown host")
    say(f"{path} is there, of {host}: waiting up to {seconds:.0f} s for its heartbeat")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(BEAT, DEAD) / 20)
        if _read(path) != seen:
            return True
    return False


def _lives_here(seen: Seen) -> bool | None:
    """Whether a holder is a process of this host that lives; None for one of another host, of which only the heartbeat tells."""
    if not (seen.holder and _place().items() <= seen.holder.items()):
        return None
    started = _start_of(seen.holder["process"])
    return started is not None and started in ("", seen.holder["started"])


def _beat(path: Path, mine: dict, released: threading.Event) -> None:
    while not released.wait(BEAT):
        try:
            seen = _read(path)
            if seen is not None and seen.holder == mine:
                os.utime(path)
                continue
        except OSError:  # of a storage that does not answer: the next heartbeat tells
            continue
        if not released.is_set():
            with suppress(OSError):  # of a closed terminal, for example
                print(f"nanochat: error: {_lost(path)}", file=sys.stderr, flush=True)
            os._exit(1)


def _lost(path: Path) -> str:
    """Why a process cannot go on that has lost its lock."""
    if not path.parent.exists():
        return (
            f"{path.parent} was removed while this process wrote to it, and what it wrote is lost; find out what removed it, "
            "bring it back from a copy if there is one, and run the same command again"
        )
    return (
        f"the lock {path} was removed or taken by another process while this one held it; this one ends, because both would write "
        "the same files; see which commands run there, and run the same command again when none does"
    )


def _remove(path: Path, mine: dict) -> None:
    with suppress(OSError):
        seen = _read(path)
        if seen is not None and seen.holder == mine:
            path.unlink(missing_ok=True)


def _read(path: Path) -> Seen | None:
    """The lock file as it is; None when there is none. It is opened, because NFS may know only an old time of a closed file."""
    try:
        with path.open(encoding="utf-8") as file:
            changed = os.fstat(file.fileno()).st_mtime_ns
            try:
                holder = json.load(file)
            except (ValueError, RecursionError):
                holder = {}
    except FileNotFoundError:
        return None
    try:
        check_shape(holder, HOLDER, str(path))
    except UserError:  # it is being written, or was not written by this program
        holder = {}
    return Seen(holder, changed)


def _place() -> dict[str, str]:
    """Where numbers of processes mean the same: a start of a host, and in it the namespace, which containers have of their own.

    Two hosts may have the same name, and their first namespaces have the same number.
    """
    namespace, boot = Path("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id")
    number = os.readlink(namespace) if namespace.exists() else ""
    return {
        "host": socket.gethostname(),
        "namespace": number + (boot.read_text("ascii").strip() if boot.exists() else ""),
    }


def _start_of(process: int) -> str | None:
    """When a process of this host was started, to tell it from a later one with its number: "" where the system does not tell.

    None when there is no such process, or when it has ended and nobody has asked for its status yet.
    """
    if process < 1:
        return None
    stat = Path("/proc", str(process), "stat")
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = stat.read_text("utf-8", errors="replace").rpartition(")")[2].split()
            return None if state in "ZX" else fields[18]
        except OSError:  # it has ended, or belongs to another user, whose processes are hidden
            pass
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    return ""
