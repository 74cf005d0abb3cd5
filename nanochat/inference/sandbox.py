"""Runs generated code in a process of its own: without network, in a temporary directory, with limits of time and memory.

It protects against accidents of generated code, not against an attacker: the process runs as the same user.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

# An audit hook cannot be removed once it is set. This one forbids everything that could reach outside of the process or outlive it.
_GUARD = """
import os, sys
home = os.getcwd()
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
forbidden = ("socket.", "subprocess.", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill", "pty.",
           "ctypes.", "os.putenv", "os.chdir", "signal.")
changing = ("os.remove", "os.rmdir", "os.rename", "os.truncate", "os.chmod", "os.chown", "os.link", "os.symlink", "os.mkdir")
def guard(event, args, join=os.path.join, normal=os.path.normpath):
    if event.startswith(forbidden):
        raise PermissionError(f"{event} is not allowed here")
    if event == "open":
        paths = args[:1] if (args[2] or 0) & writing or set(args[1] or "") & set("wax+") else ()
    else:
        paths = args if event.startswith(changing) else ()
    for path in paths:
        if isinstance(path, (str, bytes)) and not normal(join(home, os.fsdecode(path))).startswith(home + "/"):
            raise PermissionError(f"changing {path} is not allowed here")
sys.addaudithook(guard)
exec(compile(sys.stdin.read(), "<generated>", "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class Outcome:
    """The result of a program. ok: it ended by itself with status 0. reason: why not. output: the last 4 KiB it printed."""

    ok: bool
    reason: str
    output: str


def run_python(program: str, timeout: float = 5.0, memory: int = 256 * 2**20) -> Outcome:
    """Run a Python program for at most `timeout` seconds, with at most `memory` bytes of address space."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (int(timeout) + 1, int(timeout) + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    with tempfile.TemporaryDirectory(prefix="nanochat-sandbox-") as home, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD],
            cwd=home,
            env={"PATH": "/usr/bin:/bin", "HOME": home},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=limit,
            start_new_session=True,
        )
        try:
            process.communicate(program.encode("utf-8", "replace"), timeout=timeout)
            reason = "" if process.returncode == 0 else f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"ran past {timeout:g} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # the whole session, whatever it started
            except ProcessLookupError:
                pass
            process.wait()
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - 4096))
        return Outcome(not reason, reason, output.read().decode("utf-8", "replace"))
