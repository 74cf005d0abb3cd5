"""Tests generated code in two processes of its own: one runs the code, the other the tests, which ask it for answers.

Only the tests' process gives the verdict, when they have run to their end; the code has no way to it. Where the kernel allows it,
both are isolated: alone in new namespaces of users, processes, files and network, with a read-only view of the interpreter, an
empty /tmp, and a filter of system calls. Elsewhere an audit hook refuses what Python reports. That protects against accidents
of generated code, not against an attacker: the process runs as the same user.
"""

import contextlib
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from nanochat.platform.environment import library_path
from nanochat.platform.errors import UserError
from nanochat.platform.files import remove_leftovers

PREFIX = "nanochat-sandbox-"  # of the directories that programs run in
COMMAND = [sys.executable, "-I", "-S", "-u", str(Path(__file__).with_name("confined.py"))]
START_SECONDS = 60.0  # a shared file system may be slow to start Python from
OUTPUT_BYTES = 4096


@dataclass(frozen=True)
class Outcome:
    """The verdict on a program. passed: its tests ran to their end. reason: why not. output: the last 4 KiB that it printed."""

    passed: bool
    reason: str
    output: str


@functools.cache
def unsupported_reason() -> str:
    """Why the kernel does not isolate processes here; empty when it does."""
    try:
        run_tests("def one(): return 1", "def check(one): assert one() == 1", "one", isolated=True)
    except UserError as error:
        return str(error)
    return ""


def confinement() -> str:
    """What confines generated code here, for a report."""
    reason = unsupported_reason()
    return (
        f"an audit hook, which holds against accidents only ({reason})"
        if reason
        else "namespaces and a filter of system calls"
    )


def run_tests(
    program: str,
    tests: str,
    entry_point: str,
    helpers: str = "",
    timeout: float = 5.0,
    memory: int = 256 * 2**20,
    isolated: bool | None = None,
) -> Outcome:
    """Whether a function of a program passes its tests, which define check(function), within `timeout` seconds.

    helpers: code that both the program and the tests begin with. memory: bytes of address space for each of the two processes.
    Arguments and results travel by value. isolated: by the kernel or not; by default where the kernel allows it.
    Raises UserError when a process cannot be started or isolated, never because of what the program does.
    """
    isolated = not unsupported_reason() if isolated is None else isolated
    request = {"entry_point": entry_point, "helpers": helpers}
    request |= {"memory": memory, "seconds": timeout, "isolated": isolated}
    request["parent"] = os.getpid()
    request["libraries"] = [folder for folder in library_path().split(":") if folder]
    remove_leftovers(Path(tempfile.gettempdir()), f"{PREFIX}*")
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True))
        calls, results, output, answering, checking = (_pipe(stack) for _ in range(5))
        request["home"] = home
        answer = {"calls": calls[0], "results": results[1], "status": answering[1]}
        check = {"calls": calls[1], "results": results[0], "status": checking[1]}
        stack.enter_context(_process({**request, "role": "answer", "source": program}, answer, output[1]))
        stack.enter_context(_process({**request, "role": "check", "source": tests}, check, subprocess.DEVNULL))
        for end in (*answer.values(), *check.values(), output[1]):
            end.close()
        for status in (answering[0], checking[0]):
            _wait_until_confined(status)
        verdict, printed = _read_until_verdict(checking[0], output[0], time.monotonic() + timeout)
    reason = verdict if verdict is not None else f"ran past {timeout:g} s"
    return Outcome(not reason, reason, printed[-OUTPUT_BYTES:].decode("utf-8", "replace"))


def _pipe(stack: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    """The ends of a pipe, to read from and to write to."""
    reading, writing = os.pipe()
    return stack.enter_context(FileIO(reading, "r")), stack.enter_context(FileIO(writing, "w"))


@contextlib.contextmanager
def _process(request: dict, ends: dict[str, FileIO], stdout: FileIO | int) -> Iterator[None]:
    """A process that has been sent its request; killed at the end. ends: its ends of pipes, by their names in the request."""
    descriptors = {name: end.fileno() for name, end in ends.items()}
    process = subprocess.Popen(
        COMMAND,
        cwd=request["home"],
        env={"PATH": "/usr/bin:/bin", "HOME": request["home"], "LD_LIBRARY_PATH": library_path()},
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        pass_fds=descriptors.values(),
        start_new_session=True,
    )
    try:
        with contextlib.suppress(BrokenPipeError):  # it ended: it will not say that it is confined
            process.stdin.write(json.dumps(request | descriptors).encode())
            process.stdin.close()
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _wait_until_confined(status: FileIO) -> None:
    """Raises UserError unless the process says that it is confined."""
    deadline, line = time.monotonic() + START_SECONDS, b""
    while not line.endswith(b"\n"):
        byte = status.read(1) if _readable([status], deadline) else b""
        if not byte:
            raise UserError(
                f"no process for generated code starts here; to see why, run: {' '.join(COMMAND)} < /dev/null"
            )
        line += byte
    if reason := json.loads(line):
        raise UserError(f"generated code cannot be isolated: {reason}")


def _readable(files: list[FileIO], deadline: float) -> list[FileIO]:
    """The files that can be read from without waiting, at the latest at the deadline."""
    with selectors.DefaultSelector() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(max(0.0, deadline - time.monotonic()))]


def _read_until_verdict(status: FileIO, output: FileIO, deadline: float) -> tuple[str | None, bytes]:
    """Why the tests failed, "" if they passed, None if they did not end; and the end of the program's output."""
    verdict, printed, files = b"", b"", [status, output]
    while not verdict.endswith(b"\n") and time.monotonic() < deadline:
        for file in _readable(files, deadline):
            data = file.read(65536)
            if file is output:
                printed = (printed + data)[-OUTPUT_BYTES:]
            elif not data:
                return "the tests ended without a verdict", printed
            else:
                verdict += data
            if not data:
                files = [status]
    if _readable([output], 0):  # what was printed before the verdict
        printed += output.read(65536)
    return (json.loads(verdict) if verdict.endswith(b"\n") else None), printed
