"""Starts processes of Python in which torch is imported already: forks of one process that imports it, which saves seconds each.

Of our own modules and of __main__ nothing is imported before the fork. A forked process has its own arguments, environment,
folder, standard streams and status, and gets signals, as any other process. Only the seed of Python's hashes is the same in all
forks of a server. A command whose environment has to be there from the start gets a new process: see NEEDED_FROM_THE_START.
Tests of what is imported, and of what replaces a part of torch or Triton before it is, start Python themselves.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from subprocess import Popen  # of subprocess itself, tests replace it

IMPORTED = (
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.run",
    "triton",
    "pytest",
    "hypothesis.strategies",
)  # pyarrow starts a thread
NEEDED_FROM_THE_START = ("PYTHONUNBUFFERED", "PYTHONHASHSEED", "OMP_", "MKL_", "TORCH_", "TRITON", "CUDA", "LD_")


class Server:
    """The process that forks, from the first start of one on."""

    def __init__(self):
        self.lock, self.process, self.env = threading.Lock(), None, {}

    def ask(self, request: dict) -> int | None:
        with self.lock:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def can_fork(self, env: dict[str, str]) -> bool:
        """Whether a process with this environment may be a fork; starts the server for the first environment."""
        if sys.platform != "linux":
            return False
        with self.lock:
            if self.process is None:
                self.env = env
                atexit.register(self.stop)
                self.process = Popen(
                    [sys.executable, "-m", "tests.forked"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
                )  # fmt: skip
        changed = {name for name, _ in env.items() ^ self.env.items()}
        return not any(name.startswith(NEEDED_FROM_THE_START) for name in changed)


SERVER = Server()


class Forked:
    """What tests need of subprocess.Popen, for a fork whose output goes to files until it ends."""

    def __init__(self, arguments: list[str], env: dict[str, str], cwd: str, given: str = ""):
        self.returncode: int | None = None
        self.files = [tempfile.TemporaryFile("w+") for _ in range(3)]
        self.files[0].write(given)
        self.files[0].seek(0)
        streams = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in self.files]
        self.pid = SERVER.ask({"arguments": arguments, "env": env, "cwd": cwd, "streams": streams})

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = SERVER.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        self.wait(timeout)
        for file in self.files:
            file.seek(0)
        return self.files[1].read(), self.files[2].read()

    @property
    def stderr(self) -> list[str]:
        """The lines, once it has ended."""
        return self.communicate()[1].splitlines(keepends=True)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    *arguments: str, env: dict[str, str], cwd: str | os.PathLike | None = None, given: str = ""
) -> Forked | Popen:
    """Start Python with arguments that begin with -m or -c; `given` is its standard input."""
    if SERVER.can_fork(env):
        return Forked(list(arguments), env, str(cwd or os.getcwd()), given)
    stdin = tempfile.TemporaryFile("w+")
    stdin.write(given)
    stdin.seek(0)
    return Popen(
        [sys.executable, *arguments], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=cwd
    )  # fmt: skip


def run(*arguments: str, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """As `start`, to its end."""
    process = start(*arguments, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def serve() -> list[str]:
    """Answer requests until there are no more. Returns only in forks, with the arguments."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in requests:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
            answer = os.fork()
            if answer == 0:
                requests.close()
                answers.close()
                return begin(**request)
        print(json.dumps(answer), file=answers, flush=True)
    sys.exit()


def begin(arguments: list[str], env: dict[str, str], cwd: str, streams: list[str]) -> list[str]:
    """Make a fork the process that it stands for."""
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_RDWR | (os.O_APPEND if number else 0))
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    paths = env.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = ["" if arguments[0] == "-c" else cwd, *filter(None, paths)]
    del sys.modules["tests"]  # the folder may have another one
    return arguments


if __name__ == "__main__":
    kind, what, *rest = serve()
    sys.argv = [what if kind == "-m" else kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(sys.modules["__main__"]))
