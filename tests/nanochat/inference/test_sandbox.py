"""Generated code is judged by tests that it cannot reach; whatever it does, there is a verdict, and nothing outside has changed."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from nanochat.inference import sandbox
from nanochat.inference.sandbox import Outcome, run_tests, unsupported_reason

ROOT = Path(__file__).parents[3]
TESTS = "def check(f):\n    assert f(2) == 4 and f(3) == 9"
RIGHT = "def f(x):\n    return x * x\n"


@pytest.fixture(params=["kernel", "audit hook"])
def isolated(request) -> bool:
    if request.param == "kernel" and unsupported_reason():
        pytest.skip(unsupported_reason())
    return request.param == "kernel"


# --- verdicts ---


@pytest.mark.parametrize(
    "program",
    [
        "import math\nopen('scratch.txt', 'w').write('fine')\ndef f(x):\n    return round(math.sqrt(x ** 4))",
        f"{RIGHT}if __name__ == '__main__':\n    import sys\n    sys.exit(f(7))",
        f"print('x' * 3_000_000)\n{RIGHT}",
        "from dataclasses import dataclass\n@dataclass\nclass Box:\n    x: int\ndef f(x):\n    return Box(x * x).x",
        "import threading\ndef f(x):\n    out = []\n    thread = threading.Thread(target=lambda: out.append(x * x))\n"
        "    thread.start()\n    thread.join()\n    return out[0]",
    ],
    ids=["files", "main", "3 MB of output", "dataclass", "thread"],
)
def test_right_programs_pass(isolated, program):
    assert run_tests(program, TESTS, "f", isolated=isolated).passed


CHEATS = {
    "wrong": ("def f(x): return 4", "AssertionError"),
    "exit": ("import sys\nsys.exit(0)", "ended before it answered"),
    "SystemExit": ("raise SystemExit", "ended before it answered"),
    "_exit": ("import os\nos._exit(0)", "ended before it answered"),
    "exit in the function": ("def f(x): raise SystemExit(0)", "SystemExit"),
    "_exit in the function": ("import os\ndef f(x): os._exit(0)", "ended before it answered"),
    "main": ("if __name__ == '__main__':\n    import sys\n    sys.exit(0)", "ended before it answered"),
    "equal to everything": ("class A:\n  def __eq__(self, other): return True\ndef f(x): return A()", "AssertionError"),
    "a number that is equal to everything": (
        "class A(int):\n  def __eq__(self, other): return True\n  __hash__ = int.__hash__\ndef f(x): return A(5)",
        "AssertionError",
    ),
    "no assertions": (
        "import builtins, sys\nbuiltins.AssertionError = SystemExit\nsys.modules['__main__'].check = lambda *a: None\n"
        "def check(f): pass\ndef f(x): return 5",
        "AssertionError",
    ),
    "forged verdict": (
        "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'\"\"\\n' * 3)\n  except OSError: pass\ndef f(x): return 5",
        "TypeError",
    ),
    "frames": (
        "import gc, os, sys\nframe, found = sys._getframe(), []\nwhile frame:\n  found.append(repr(frame.f_locals))\n"
        "  frame = frame.f_back\nfound += [repr(o) for o in gc.get_objects() if type(o) in (dict, list, str)]\n"
        "print(len(found), 'BROKE' if any('f(3) ' + '== 9' in text for text in found) else 'held')\ndef f(x): return 5",
        "AssertionError",
    ),
    "an answer without end": ("def f(x): return 'x' * 10**8", "MemoryError"),
    "syntax": ("def broken(:", "ended before it answered"),
    "no function": ("x = 1", "ended before it answered"),
    "closed descriptors": ("import os\nos.closerange(0, 64)\ndef f(x): return 4", "ended before it answered"),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_pass_needs_tests_that_ran_to_their_end(isolated, name):
    program, reason = CHEATS[name]
    outcome = run_tests(program, TESTS, "f", isolated=isolated)
    assert not outcome.passed and reason in outcome.reason and "BROKE" not in outcome.output


def test_what_a_program_printed_is_kept_to_its_last_4_kib(isolated):
    outcome = run_tests("print('x' * 10_000)\nprint('end')\n1 / 0", TESTS, "f", isolated=isolated)
    assert len(outcome.output) == 4096 and "end\n" in outcome.output and "ZeroDivisionError" in outcome.output


def test_values_travel_as_they_are(isolated):
    value = "[1, 2.5, float('inf'), 'ü\\ud800', None, True, (1, (2,)), {1: {'a': {3}}}, 10 ** 5000, 2 + 1j, b'x', {(1,): 2}]"
    tests = (
        f"from collections import Counter\nfrom fractions import Fraction\nvalue = {value}\ndef check(f):\n"
        "    assert f(value, key=(3,)) == (value, (3,)) and type(f(value)[0][-3]) is complex\n"
        "    assert f(Counter('aab'))[0] == {'a': 2, 'b': 1} and f(Fraction(1, 3))[0] * 3 == 1\n"
        "    assert f(iter([1])) != f(iter([1]))"
    )
    assert run_tests("def f(x, key=None): return x, key", tests, "f", isolated=isolated) == Outcome(True, "", "")


def test_helpers_serve_the_program_and_the_tests(isolated):
    helpers = "import math\ndef twice(x):\n    return 2 * x"
    tests = "def check(f):\n    assert f(2) == twice(math.floor(2.5))"
    assert run_tests("def f(x): return twice(math.ceil(1.5))", tests, "f", helpers, isolated=isolated).passed


def test_tests_that_need_too_much_fail(isolated):
    for tests, reason in (
        ("def check(f):\n    'x' * 10**9", "MemoryError"),
        ("import os\nos._exit(0)", "without a verdict"),
    ):
        outcome = run_tests(RIGHT, tests, "f", isolated=isolated)
        assert not outcome.passed and reason in outcome.reason


# --- attacks ---

# Each is the body of a function. OUTSIDE is a folder with the file `kept`, VICTIM a process of the same user.
ATTACKS = {
    "rmtree": "shutil.rmtree(OUTSIDE, ignore_errors=True)",
    "remove": "os.remove(OUTSIDE + '/kept')",
    "remove relative to a folder": "os.remove('kept', dir_fd=os.open(OUTSIDE, os.O_RDONLY))",
    "write": "open(OUTSIDE + '/kept', 'w')",
    "write relative to a folder": "os.open('new', os.O_CREAT | os.O_WRONLY, dir_fd=os.open(OUTSIDE, os.O_RDONLY | os.O_DIRECTORY))",
    "write beside the library": "open(os.__file__ + '.new', 'w')",
    "write relative to the library": "folder = os.open(os.path.dirname(os.__file__), os.O_RDONLY)\n"
        "os.open('nanochat-new', os.O_CREAT | os.O_WRONLY, dir_fd=folder)",
    "write through a link": "os.symlink(OUTSIDE, 'link')\nopen('link/new', 'w')",
    "hard link": "os.link(OUTSIDE + '/kept', 'kept')\nopen('kept', 'w')",
    "mkfifo": "os.mkfifo(OUTSIDE + '/new')",
    "mkdir": "os.mkdir(OUTSIDE + '/new')",
    "utime": "os.utime(OUTSIDE + '/kept', (0, 0))",
    "chmod": "os.chmod(OUTSIDE + '/kept', 0)",
    "rename": "os.rename(OUTSIDE + '/kept', 'kept')",
    "truncate": "os.truncate(OUTSIDE + '/kept', 0)",
    "database": "import sqlite3\nsqlite3.connect(OUTSIDE + '/new').execute('create table t (x)')",
    "list": "os.listdir(OUTSIDE)[0]",
    "read": "open(OUTSIDE + '/kept').read()",
    "read what is everybody's": "open('/etc/passwd').read()",
    "memory of the runner": "open('/proc/self/mem', 'rb').read(1)",
    "environment of the parent": "open(f'/proc/{VICTIM}/environ').read()",
    "environment": "os.environ['NANOCHAT_SECRET']",
    "kill": "os.kill(VICTIM, 9)",
    "kill by descriptor": "import signal\nsignal.pidfd_send_signal(os.pidfd_open(VICTIM), 9)",
    "kill by system call": "if syscall(62, VICTIM, 9): 1 / 0",
    "kill everything": "syscall(62, -1, 9)\n1 / 0",
    "fork": "os.fork()",
    "fork bomb": "while True: os.fork()",
    "fork by system call": "if syscall(57) < 0: 1 / 0",
    "daemon": "if os.fork(): return\nos.setsid()\nif os.fork(): os._exit(0)\ntime.sleep(60)",
    "another program": "import subprocess\nsubprocess.run(['true'])",
    "exec": "os.execv('/usr/bin/true', ['true'])",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 9))",
    "socket": "import socket\nsocket.socketpair()",
    "memory": "'x' * 10**9",
    "memory in a file without a name": "fd = os.memfd_create('x')\nfor _ in range(600): os.write(fd, bytes(2**20))",
    "shared memory": "from multiprocessing import shared_memory\nshared_memory.SharedMemory('nanochat-sandbox', True, 2**20)",
    "shared memory of System V": "if syscall(29, 0, 2**20, 0o1777) < 0: 1 / 0",
    "many files": "for i in range(300):\n    with open(f'{i}', 'wb') as file: file.write(bytes(2**20))",
    "many folders": "for i in range(5000): os.mkdir(f'{i}')",
    "threads": "import threading\nfor _ in range(1000): threading.Thread(target=time.sleep, args=(60,)).start()",
    "ptrace": "if syscall(101, 16, VICTIM, 0, 0): 1 / 0",
    "mount": "if syscall(165, b'none', b'/tmp', b'tmpfs', 0, 0): 1 / 0",
    "another namespace": "if syscall(272, 0x10000000): 1 / 0",
    "endless": "while True: pass",
    "endless output": "while True: print('x' * 1000)",
    "deaf": "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, PermissionError): pass\nwhile True: pass",
}  # fmt: skip
PRELUDE = """
import os, shutil, sys, time
OUTSIDE, VICTIM = {outside!r}, {victim}
def syscall(*arguments):
    import ctypes
    return ctypes.CDLL(None).syscall(*arguments)
def f():
    {body}
    return "done"
"""


def snapshot(folder: Path) -> list:
    return [(p.name, p.stat().st_mode, p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.iterdir())]


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(isolated, name, tmp_path, monkeypatch):
    body = ATTACKS[name]
    if "syscall" in body and os.uname().machine != "x86_64":
        pytest.skip("has the numbers of another machine's system calls")
    if name == "kill everything" and not isolated:
        pytest.skip("a hook that does not hold would end the tests")
    outside = tmp_path / "checkpoints"
    outside.mkdir()
    (outside / "kept").write_text("precious")
    before = snapshot(outside)
    monkeypatch.setenv("NANOCHAT_SECRET", "secret")
    victim = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    started = time.monotonic()
    try:
        program = PRELUDE.format(outside=str(outside), victim=victim.pid, body=body.replace("\n", "\n    "))
        outcome = run_tests(program, "def check(f): assert f() == 'done'", "f", timeout=2.0, isolated=isolated)
        assert isinstance(outcome, Outcome) and time.monotonic() - started < 30
        assert outcome.passed == (name == "rmtree")  # which ignores errors
        assert snapshot(outside) == before and victim.poll() is None
        assert not Path("/dev/shm/nanochat-sandbox").exists()
    finally:
        victim.kill()
        victim.wait()


def test_nothing_of_a_judged_program_is_left(isolated, monkeypatch):
    mark = f"nanochat-judged-by-{os.getpid()}"
    monkeypatch.setattr(sandbox, "COMMAND", [*sandbox.COMMAND, mark])
    program = (
        "import threading, time\n"
        "def f(x):\n    threading.Thread(target=time.sleep, args=(60,)).start()\n    return x * x\n"
    )
    assert run_tests(program, TESTS, "f", isolated=isolated).passed
    wait_until(lambda: not marked(mark))  # the kernel ends an isolated process just after its parent


def test_a_judged_program_ends_with_the_process_that_judges(isolated):
    mark = f"nanochat-orphan-of-{os.getpid()}"
    code = (
        "import os\nfrom nanochat.inference import sandbox\nsandbox.COMMAND.append(os.environ['MARK'])\n"
        f"sandbox.run_tests('import time; time.sleep(60)', 'def check(f): f()', 'f', timeout=60, isolated={isolated})"
    )
    judging = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "MARK": mark})
    wait_until(lambda: len(marked(mark)) == 2 * (1 + isolated))  # isolated ones have a parent outside of the namespace
    time.sleep(0.5)  # until they are confined
    judging.kill()
    judging.wait()
    wait_until(lambda: not marked(mark))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def marked(mark: str) -> list[Path]:
    """The processes with a word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path] if mark in path.read_text(errors="replace") else []
        except OSError:
            continue
    return found


# --- where the kernel allows less, and as an ordinary user ---

REPORT = """
from nanochat.inference.sandbox import run_tests, unsupported_reason
reason = unsupported_reason()
right = run_tests("def f(): return 4", "def check(f): assert f() == 4", "f")
wrong = run_tests("def f(): import os; os.fork()", "def check(f): f()", "f")
print(right.passed, wrong.passed, reason or "isolated")
"""


def report_of(command: list[str], **options) -> str:
    """What REPORT prints in a process that is started by `command`, from a copy of the sandbox that every user may read."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for name in ("inference", "platform"):
            shutil.copytree(ROOT / "nanochat" / name, Path(folder, "nanochat", name))
        shutil.copy(ROOT / "nanochat" / "__init__.py", Path(folder, "nanochat"))
        env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": folder}
        done = subprocess.run(
            [*command, REPORT], env=env, cwd="/", capture_output=True, text=True, timeout=120, **options
        )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_ordinary_user():
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root, and a Python that every user may run")
    report = report_of([python, "-c"], user=65534, group=65534, extra_groups=[])
    assert report == f"True False {unsupported_reason() or 'isolated'}"


@pytest.mark.skipif(bool(unsupported_reason()), reason="the kernel does not isolate here anyway")
def test_a_kernel_that_refuses_namespaces():
    """In a user namespace whose processes may not make others, as on a machine that allows none."""
    refuse = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    report = report_of(["unshare", "--user", "--map-root-user", "sh", "-c", refuse, sys.executable])
    assert report.startswith("True False generated code cannot be isolated: OSError") and "unshare" in report


def test_what_a_killed_judge_left_is_removed_by_a_later_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, recent, link, other = (
        tmp_path / name for name in ("nanochat-sandbox-a", "nanochat-sandbox-b", "nanochat-sandbox-c", "x")
    )
    for folder in (killed, recent, other):
        folder.mkdir()
        (folder / "file").touch()
    link.symlink_to(other)
    for path in (killed, link, other):
        os.utime(path, (time.time() - 2 * 3600,) * 2, follow_symlinks=False)
    assert run_tests(RIGHT, TESTS, "f").passed
    assert (recent / "file").exists() and (other / "file").exists() and not killed.exists()
